import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.evaluation import figures
from fastmask.evaluation.figures import draw_comparison, draw_loss


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: found.append(figure))
    return found


def test_the_loss_curve_has_no_reconstruction_where_nothing_is_masked(drawn, tmp_path):
    losses = [(1.0, 0.9, 0.5, 0.5), (0.9, 0.8, 0.4, 0.5), (0.7, 0.7, 0.0, 0.0), (0.6, 0.6, 0.0, 0.0)]
    names = ("loss", "denoising", "reconstruction", "loss_at_log_snr/0")
    stats = [
        {"step": i, **dict(zip(names, (*of[:3], 1.0), strict=True)), "mask_ratio": of[3]} for i, of in enumerate(losses)
    ]
    draw_loss(tmp_path / "loss.png", stats)
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].get_lines()}
    assert list(lines["reconstruction"]) == [0.5, 0.4]
    assert list(lines["loss"]) == [1.0, 0.9, 0.7, 0.6]
    assert lines.keys() == {"loss", "denoising", "reconstruction"}


@pytest.mark.parametrize("channels", [1, 3])
def test_each_column_is_a_class(drawn, tmp_path, channels):
    """Class c is of grey value c / 10, on both sides; a class that one side lacks is left out."""
    labels = torch.arange(60) % 6
    images = (labels / 5 - 0.5).view(-1, 1, 1, 1).expand(-1, channels, 4, 4)
    kept = labels != 2
    draw_comparison(tmp_path / "c.png", images[kept], labels[kept], images, labels, [f"class {c}" for c in range(6)])
    for axis in drawn[0].axes:
        canvas = np.asarray(axis.get_images()[0].get_array())
        assert canvas.shape == (8 * 6, 5 * 6, 3)
        expected = [round((c / 5 - 0.5) * 127.5 + 127.5) for c in (0, 1, 3, 4, 5)]
        assert canvas[2, 3::6, 0].tolist() == pytest.approx(expected, abs=1)
        assert [text.get_text() for text in axis.get_xticklabels()] == [f"class {c}" for c in (0, 1, 3, 4, 5)]


def test_images_without_labels_are_mixed(tmp_path):
    path = tmp_path / "c.png"
    draw_comparison(path, torch.rand(30, 3, 6, 6), None, torch.rand(90, 3, 6, 6), None, [])
    with Image.open(path) as image:
        assert image.width > 500
