"""Published extractors, with random weights."""

import importlib.util

import numpy as np
import pytest
import torch
from squares import loads

from fastmask.evaluation import features
from fastmask.evaluation.compare import Seen, compare
from fastmask.evaluation.features import Dinov2, Inception
from fastmask.evaluation.images import Statistics
from fastmask.evaluation.metrics import Gaussian

has_fidelity = pytest.mark.skipif(not loads("torch_fidelity"), reason="torch-fidelity is not there, or does not load")
has_timm = pytest.mark.skipif(not loads("timm"), reason="timm is not there, or does not load")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 40, 40))).float() / 127.5 - 1


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    from torch_fidelity import feature_extractor_inceptionv3 as module  # noqa: PLC0415

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return state

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    blank = tmp_path_factory.mktemp("blank") / "none.pth"
    torch.save({}, blank)
    torch.save(Blank("x", ["2048"], str(blank)).state_dict(), path)
    return path


@has_fidelity
def test_inception_is_torch_fidelitys(inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: PLC0415

    ours = Inception(str(inception))
    assert "not with the weights of FID" in ours.name
    seen = ours(IMAGES)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception))
    pixels = ((IMAGES + 1) * 127.5).round().byte()
    values, logits = theirs(pixels)
    assert torch.equal(seen.values, values)
    assert torch.equal(seen.logits, logits)
    assert seen.spatial.shape == (8, 7 * 17 * 17)
    grey = ours(IMAGES[:, :1])
    assert torch.equal(grey.values, theirs(pixels[:, :1].expand(-1, 3, -1, -1))[0])


@has_fidelity
def test_metrics_of_inception(inception, tmp_path):
    ours = Inception(str(inception))
    more = Seen(ours(torch.cat([IMAGES, IMAGES.flip(3), IMAGES.flip(2)])))
    found = compare(ours, Seen(ours(IMAGES)), more)
    assert found.keys() == {
        *("fid", "fid_bias", "sfid", "is", "kid", "precision", "recall", "density", "coverage"),
    }
    # The same by statistics in a file.
    pool, spatial = Gaussian.of(more.features.values), Gaussian.of(more.features.spatial)
    path = tmp_path / "stats.npz"
    np.savez(path, mu=pool.mean, sigma=pool.cov, mu_s=spatial.mean, sigma_s=spatial.cov)
    stated = compare(ours, Seen(ours(IMAGES)), Statistics(path))
    assert stated.keys() == {"fid", "fid_bias", "sfid", "is"}
    assert stated["fid"] == pytest.approx(found["fid"])
    assert stated["sfid"] == pytest.approx(found["sfid"])


@has_fidelity
def test_weights_that_are_missing_or_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"6726825d\.pth does not exist, and FID needs .* download https://"):
        Inception()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no weights of Inception v3"):
        Inception(str(tmp_path / "other.pth"))


@has_timm
def test_dinov2(tmp_path, monkeypatch):
    import timm  # noqa: PLC0415

    monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")
    net = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=224, num_classes=0)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    ours = Dinov2(str(tmp_path / "dino.pth"))
    values = ours(IMAGES).values
    assert values.shape == (8, 384)
    # As timm's own transform of a Pillow image has it, up to the rounding of its resized pixels to 8 bits.
    from PIL import Image  # noqa: PLC0415

    pixels = ((IMAGES + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    large = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in pixels]
    batch = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(of)[:, None, None] for of in (net.default_cfg["mean"], net.default_cfg["std"]))
    with torch.no_grad():
        expected = net.eval()((batch - mean) / std)
    assert torch.nn.functional.cosine_similarity(values, expected).min() > 0.999
    with pytest.raises(ValueError, match="none does not exist"):
        Dinov2(str(tmp_path / "none"))


def test_extractors_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for extractor, message in ((Inception, "pip install torch-fidelity"), (Dinov2, "pip install timm")):
        with pytest.raises(ValueError, match=message):
            extractor()


def test_latents_are_no_images():
    with pytest.raises(ValueError, match="latents of 4 channels, and this extractor takes images"):
        features._rgb(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_an_extractor_that_does_not_load(monkeypatch):
    """Such as with a torchvision of another torch."""

    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ValueError, match="FID needs torch-fidelity, and the installed one does not load: operator"):
        Inception()
