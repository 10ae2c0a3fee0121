"""Images decoded at each visit: of a folder, and of what else `prepare` takes."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data.images.dataset import ImageDataset
from fastmask.data.sources.open import open_source


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def folder(path, image_size=16, num_classes=None, flip=False):
    return ImageDataset(open_source(path), image_size, num_classes, flip)


def one(path, image_size=16):
    """Return the pixels (H, W, 3) that a folder of a single image reads as."""
    return folder(path, image_size).read(np.array([0]))[0][0].permute(1, 2, 0).numpy()


def png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_classes_are_the_folders_in_order(tmp_path):
    pixels = noise(5, 16, 16, 3)
    for i, name in enumerate(["dog/b.png", "cat/z.png", "dog/a.png", "eel/deep/er/x.png", "cat/Y.PNG"]):
        png(tmp_path / name, pixels[i])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "cat" / "notes.txt").write_text("")
    data = folder(tmp_path)
    assert (len(data), data.shape, data.num_classes, data.class_names) == (5, (3, 16, 16), 3, ["cat", "dog", "eel"])
    stored, labels = data.read(np.arange(5))
    assert labels.tolist() == [0, 0, 1, 1, 2]
    assert np.array_equal(stored.permute(0, 2, 3, 1).numpy(), pixels[[4, 1, 2, 0, 3]])
    assert folder(tmp_path, num_classes=5).class_names == ["cat", "dog", "eel", "3", "4"]


@pytest.mark.parametrize("num_classes", [None, 0])
def test_images_without_classes(tmp_path, num_classes):
    for i in range(3):
        png(tmp_path / f"{i}.png", noise(16, 16, 3))
    data = folder(tmp_path, num_classes=num_classes)
    assert (len(data), data.num_classes, data.class_names) == (3, 0, [])
    assert data.read(np.arange(3))[1].tolist() == [0, 0, 0]


def test_a_folder_mirrors_too(tmp_path):
    png(tmp_path / "0.png", noise(16, 16, 3))
    data = folder(tmp_path, flip=True)
    stored = data.read(np.zeros(32, np.int64))[0]
    different = {image.numpy().tobytes() for image in data.to_images(stored, 0, torch.arange(32))}
    assert len(different) == 2


def test_gray_repeats_its_channel(tmp_path):
    pixels = noise(16, 16)
    png(tmp_path / "0.png", pixels)
    assert np.array_equal(one(tmp_path), np.stack([pixels] * 3, 2))


def test_transparent_pixels_are_white(tmp_path):
    pixels = noise(16, 16, 4)
    pixels[..., 3] = np.where(pixels[..., 0] < 99, 0, 255)
    png(tmp_path / "0.png", pixels)
    assert np.array_equal(one(tmp_path), np.where(pixels[..., 3:] == 0, 255, pixels[..., :3]))


def test_palette(tmp_path):
    image = Image.fromarray(noise(16, 16, 3)).quantize(16)
    image.save(tmp_path / "0.png")
    assert np.array_equal(one(tmp_path), np.asarray(image.convert("RGB")))


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    image.save(tmp_path / "0.jpg", quality=100)
    assert np.abs(one(tmp_path).astype(int) - [255, 0, 255]).max() <= 2


def test_one_bit(tmp_path):
    image = Image.fromarray(noise(16, 16)).convert("1")
    image.save(tmp_path / "0.png")
    assert np.array_equal(one(tmp_path)[..., 0], np.asarray(image) * np.uint8(255))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    pixels = np.linspace(0, 65535, 256).round().reshape(16, 16).astype(np.uint16)
    if suffix == ".ppm":
        (tmp_path / "0.ppm").write_bytes(b"P5 16 16 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(tmp_path / f"0{suffix}")
    assert np.array_equal(one(tmp_path)[..., 1], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range(tmp_path, dtype):
    Image.fromarray(np.ones((16, 16), dtype)).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match=r"0\.tif cannot be read as an image: .* store it with 8 or 16 bits"):
        folder(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut off"])
def test_an_unreadable_image_is_named(tmp_path, suffix, damage):
    file = tmp_path / f"image{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(file)
    file.write_bytes({"empty": b"", "text": b"<html>", "cut off": file.read_bytes()[:700]}[damage])
    with pytest.raises(ValueError, match=rf"image\{suffix} cannot be read as an image: \w") as error:
        folder(tmp_path)
    assert str(error.value).startswith(str(file))
    assert "BytesIO" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_huge_image_is_named(tmp_path, monkeypatch):
    png(tmp_path / "0.png", noise(16, 16, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image: Image size"):
        folder(tmp_path)


def test_a_later_image_fails_when_read(tmp_path):
    png(tmp_path / "0.png", noise(16, 16, 3))
    (tmp_path / "1.png").write_bytes(b"")
    data = folder(tmp_path)
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        data.read(np.array([0, 1]))


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images: expected .*/CLASS/IMAGE\.png"):
        folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data.txt").write_text("")
    with pytest.raises(ValueError, match="holds no images"):
        folder(tmp_path)


def test_images_beside_class_folders(tmp_path):
    png(tmp_path / "stray.png", noise(16, 16, 3))
    png(tmp_path / "a" / "0.png", noise(16, 16, 3))
    with pytest.raises(ValueError, match=r"images beside its class folders \(stray\.png\): move them into one"):
        folder(tmp_path)


def test_class_counts_that_do_not_fit(tmp_path):
    for name in "abc":
        png(tmp_path / "classes" / name / "0.png", noise(16, 16, 3))
    png(tmp_path / "loose" / "0.png", noise(16, 16, 3))
    with pytest.raises(ValueError, match="the images have 3 classes, more than num_classes 2"):
        folder(tmp_path / "classes", num_classes=2)
    with pytest.raises(ValueError, match="have no labels, but num_classes is 2"):
        folder(tmp_path / "loose", num_classes=2)


def test_without_pillow(tmp_path, monkeypatch):
    png(tmp_path / "0.png", noise(16, 16, 3))

    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ValueError, match=r"pip install pillow"):
        folder(tmp_path)


def test_tars_are_trained_on_too(tmp_path):
    """WebDataset's, whose labels are counted, since nothing names the classes."""
    pixels = noise(4, 16, 16, 3)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for i, label in enumerate([2, 0, 5, 2]):
            image = io.BytesIO()
            Image.fromarray(pixels[i]).save(image, "PNG")
            for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.cls", b"%d" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = folder(tmp_path / "data.tar")
    assert (len(data), data.num_classes, data.class_names) == (4, 6, list("012345"))
    stored, labels = data.read(np.array([3, 2]))
    assert labels.tolist() == [2, 5]
    assert np.array_equal(stored.permute(0, 2, 3, 1).numpy(), pixels[[3, 2]])
    with pytest.raises(ValueError, match="the images have 6 classes, more than num_classes 5"):
        folder(tmp_path / "data.tar", num_classes=5)


def test_an_image_of_several_frames(tmp_path):
    frames = [Image.fromarray(noise(16, 16) // (i + 1)) for i in range(3)]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"0\.gif cannot be read as an image: it has 3 frames: keep one of them"):
        folder(tmp_path)
