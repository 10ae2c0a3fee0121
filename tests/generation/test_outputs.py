import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.generation.model import Batches
from fastmask.generation.outputs import Arrays, Folder, Grid, Latents, write_npz

BATCHES = Batches(5, 2)
LABELS = np.array([0, 1, 2, 0, 1])


def written(tmp_path, kind, out, values, cycle=3, names=("a", "b, c", "d")):
    output = kind(tmp_path / out, BATCHES, LABELS, names, cycle)
    for batch in range(BATCHES.count):
        assert not output.part(tmp_path / "parts", batch).exists()
        output.write(tmp_path / "parts", batch, values[2 * batch : 2 * batch + 2])
        assert output.part(tmp_path / "parts", batch).exists()
    output.join(tmp_path / "parts")
    return tmp_path / out


def images(channels):
    return torch.randint(256, (5, 32, 32, channels), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_of_colours(tmp_path, channels):
    values = images(channels)
    with np.load(written(tmp_path, Arrays, "a.npz", values)) as file:
        assert file.files == ["arr_0", "labels"]
        assert np.array_equal(file["arr_0"], values.expand(-1, -1, -1, 3))
        assert (file["labels"].dtype, file["labels"].tolist()) == (np.int64, LABELS.tolist())


def test_latents(tmp_path):
    values = torch.randn(5, 16, 4, 4)
    assert not Latents.decoded
    with np.load(written(tmp_path, Latents, "a.npz", values)) as file:
        assert file.files == ["latents", "labels"]
        assert np.array_equal(file["latents"], values)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("cycle", "columns"), [(3, 3), (1, 8), (17, 8)])
def test_a_grid(tmp_path, channels, cycle, columns):
    values = images(channels)
    with Image.open(written(tmp_path, Grid, "a.png", values, cycle)) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (-(-5 // columns) * 32, columns * 32, 3)
    assert np.array_equal(pixels[:32, 32:64], values[1].expand(-1, -1, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder(tmp_path, channels):
    values, out = images(channels), written(tmp_path, Folder, "deep", images(channels), names=())
    assert [path.name for path in sorted(out.iterdir())] == [*(f"{i:06d}.png" for i in range(5)), "labels.csv"]
    assert (out / "labels.csv").read_text().splitlines() == [
        "index,class id,class name",
        *(f"{i},{n}," for i, n in enumerate(LABELS)),
    ]
    (tmp_path / "other").mkdir()
    with Image.open(written(tmp_path / "other", Folder, "b", values) / "000004.png") as image:
        assert np.array_equal(np.asarray(image).reshape(32, 32, channels), values[4])
    assert (tmp_path / "other" / "b" / "labels.csv").read_text().splitlines()[2] == '1,1,"b, c"'


def test_an_npz_is_written_in_parts(tmp_path):
    """Larger than any part, in the bytes of numpy's own; a part is read when it is its turn."""
    parts = [np.full((3, 2), i, np.float32) for i in range(4)]
    write_npz(tmp_path / "a.npz", "x", iter(parts), 12, {"y": np.arange(3)})
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["x"], np.concatenate(parts))
        assert file["y"].tolist() == [0, 1, 2]
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


def test_a_failed_write_leaves_nothing(tmp_path):
    def parts():
        yield np.zeros((1, 2))
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_npz(tmp_path / "a.npz", "x", parts(), 2, {})
    assert not list(tmp_path.iterdir())
