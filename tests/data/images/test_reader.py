import numpy as np
import pytest
from PIL import Image

from fastmask.data.images.dataset import ImageDataset
from fastmask.data.images.reader import ImageReader, decoded, say_source
from fastmask.data.sources.open import open_source


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
    source, data = open_source(folder), ImageDataset(open_source(folder), 16, None, False)
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


def test_jpegs_are_left_to_dali_but_for_those_that_exif_turns(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(noise(16, 16, 3)).save(tmp_path / "a.jpg")
    Image.fromarray(noise(16, 16, 3)).save(tmp_path / "b.jpg", exif=exif)
    Image.fromarray(noise(16, 16, 3)).save(tmp_path / "c.png")
    source = open_source(tmp_path)
    read, decode = ImageReader(source, 16, keep_jpegs=True), ImageReader(source, 16)
    assert read(0)[0] == (tmp_path / "a.jpg").read_bytes()
    for item in (1, 2):
        assert np.array_equal(read(item)[0], decode(item)[0])
    assert not np.array_equal(decode(1)[0], decode(0)[0])


def test_a_jpeg_that_is_a_strip_does_not_reach_dali(tmp_path):
    Image.fromarray(noise(1, 30, 3)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image: it has 30 x 1 pixels: one side is more"):
        ImageReader(open_source(tmp_path), 16, keep_jpegs=True)(0)


def test_what_is_said_of_a_source(folder, capsys):
    (folder / "a" / "0.png").write_bytes(b"damaged")
    (folder / "a" / ".0.png").write_bytes(b"")
    for size, lines in [
        (16, []),
        (40, []),
        (43, ["it: 1 of 7 images looked at are enlarged more than twice, from a side of 21 to 43"]),
        (256, ["it: 6 of 7 images looked at are enlarged more than twice, from a side of 21 to 256"]),
    ]:
        say_source("it", open_source(folder), size)
        assert capsys.readouterr().out.splitlines() == [
            "it: folder, 7 images, 2 classes by folder: a, b",
            "it: left out, hidden, or left behind by a system: 1 (a/.0.png)",
            *lines,
        ]


def test_arrays_that_are_resized(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=noise(3, 20, 16, 1))
    source = open_source(tmp_path / "a.npz")
    say_source("it", source, 16)
    assert capsys.readouterr().out.splitlines() == ["it: npz, 3 images, no classes"]
    say_source("it", source, 256)
    assert "it: images are resized from a side of 16 to 256" in capsys.readouterr().out.splitlines()


def test_only_some_images_are_looked_at(tmp_path, capsys):
    for i in range(100):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    source, read = open_source(tmp_path), []
    source.content = lambda item: read.append(item) or (tmp_path / f"{item}.png").read_bytes()
    say_source("it", source, 64)
    assert "16 of 16 images looked at are enlarged" in capsys.readouterr().out
    assert len(set(read)) == 16
