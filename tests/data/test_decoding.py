import numpy as np
import pytest
from PIL import Image

from fastmask.data.decoding import decoded
from fastmask.data.imageset import ImageSet
from fastmask.data.sources import open_source


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(20 + i, 40, 3, seed=i)).save(path)
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_those_of_training(folder, num_workers):
    source, data = open_source(folder), ImageSet(open_source(folder), 16, None, False)
    parts = [range(3), range(3, 4), range(4, 7)]
    found = list(decoded(source, 16, parts, num_workers))
    assert [len(part.labels) for part in found] == [3, 1, 3]
    pixels, labels = data.read(np.arange(7))
    assert np.array_equal(np.concatenate([part.values for part in found]), pixels.numpy())
    assert np.concatenate([part.labels for part in found]).tolist() == labels.tolist()
    assert all(part.bad == [] for part in found)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_told(folder, num_workers):
    (folder / "a" / "0.png").write_bytes(b"")
    (folder / "b" / "1.png").unlink()
    (folder / "b" / "1.png").symlink_to("1.png")
    source = open_source(folder)
    first, second = decoded(source, 16, [range(1), range(1, 7)], num_workers)
    assert len(first.values) == len(first.labels) == 0
    assert len(second.labels) == 5
    assert [name for name, _ in first.bad + second.bad] == [str(folder / "a" / "0.png"), str(folder / "b" / "1.png")]
    assert "0.png cannot be read as an image: it is empty" in first.bad[0][1]
    assert "Too many levels of symbolic links" in second.bad[0][1]


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays(tmp_path, channels):
    images = noise(3, 20, 16, channels)
    np.savez(tmp_path / "a.npz", images=images)
    source = open_source(tmp_path / "a.npz")
    (part,) = decoded(source, 16, [range(3)], 0)
    assert part.values.dtype == np.uint8
    assert np.array_equal(part.values, images[:, 2:18].transpose(0, 3, 1, 2))
