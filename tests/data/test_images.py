from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data.images import ImageArray, ImageFolder, resize_and_crop
from fastmask.kernels import random_uniform

PATH = Path("some.npz")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def array(images, image_size=16, mirror=False, **labels):
    return ImageArray(PATH, {"images": images, **labels}, image_size, mirror)


def folder(path, image_size=16, num_classes=None, mirror=False):
    return ImageFolder(path, image_size, num_classes, mirror)


def one(path, image_size=16):
    """Return the pixels (H, W, 3) that a folder of a single image reads as."""
    return folder(path, image_size).read(np.array([0]))[0][0].permute(1, 2, 0).numpy()


def png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_pixels_scale_to_one():
    images = np.array([0, 51, 127, 128, 255], np.uint8).reshape(5, 1, 1, 1)
    data = array(images, 1)
    values = data.to_images(data.read(np.arange(5))[0], 0, torch.arange(5)).flatten()
    torch.testing.assert_close(values, torch.tensor([-1, -0.6, -1 / 255, 1 / 255, 1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 16, 16, 3), (4, 16, 16, 1), (4, 16, 16)], ids=str)
def test_channels_come_first(shape):
    images = noise(*shape)
    stored, labels = array(images).read(np.array([2, 0]))
    assert stored.dtype == torch.uint8
    assert np.array_equal(stored.permute(0, 2, 3, 1).numpy(), images[[2, 0]].reshape(2, 16, 16, -1))
    assert labels.tolist() == [0, 0]


def test_labels_of_an_array():
    data = array(noise(3, 16, 16, 3), labels=np.array([2, 0, 1]), num_classes=np.array(5))
    assert (data.num_classes, data.class_names) == (5, list("01234"))
    assert data.read(np.array([1, 0]))[1].tolist() == [0, 2]


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (2, 1, 5, 1), (2, 5, 1), (2, 40, 25, 3), (2, 40, 25)], ids=str)
def test_an_array_of_another_side_is_resized(shape):
    images = noise(*shape)
    stored, _ = array(images).read(np.arange(2))
    gray = len(shape) == 3 or shape[3] == 1
    assert stored.shape == (2, 1 if gray else 3, 16, 16)
    first = Image.fromarray(images[1].reshape(shape[1:3]) if gray else images[1])
    assert np.array_equal(stored[1].permute(1, 2, 0).squeeze(2).numpy(), np.asarray(resize_and_crop(first, 16)))


@pytest.mark.parametrize(
    "images",
    [
        noise(2, 16, 16, 3).astype(np.float32),
        noise(2, 16, 16, 3).astype(np.int64),
        noise(2, 16, 16, 2),
        noise(2, 3, 16, 16),
        noise(2, 16),
        noise(2, 0, 16, 3),
    ],
    ids=lambda images: f"{images.dtype}-{images.shape}",
)
def test_an_array_of_something_else(images):
    with pytest.raises(ValueError, match=r"some\.npz: `images` must be uint8 of shape .*, not ") as error:
        array(images)
    assert f"{images.dtype} of shape {images.shape}" in str(error.value)


def test_mirroring_is_a_function_of_seed_and_global_index():
    images = noise(64, 16, 16, 3)
    data = array(images, mirror=True)
    stored, sample = data.read(np.arange(64))[0], torch.arange(100, 164)
    plain = stored.float() / 127.5 - 1
    drawn = data.to_images(stored, 3, sample)
    flipped = random_uniform(3, sample, 1, 5)[:, 0] < 0.5
    assert 20 < flipped.sum() < 44
    assert torch.equal(drawn[~flipped], plain[~flipped])
    assert torch.equal(drawn[flipped], plain[flipped].flip(3))
    # The same whatever the batch; different at the next visit and under another seed.
    assert torch.equal(data.to_images(stored[40:], 3, sample[40:]), drawn[40:])
    assert not torch.equal(data.to_images(stored, 3, sample + 64), drawn)
    assert not torch.equal(data.to_images(stored, 4, sample), drawn)
    assert torch.equal(array(images).to_images(stored, 3, sample), plain)


def test_crop_keeps_an_image_that_fits():
    pixels = noise(16, 16, 3)
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(pixels), 16)), pixels)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_halving_averages_boxes(factor):
    pixels = np.repeat(np.repeat(noise(16, 16, 3), factor, 0), factor, 1)
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(pixels), 16)), pixels[::factor, ::factor])
    checkers = np.indices((16 * factor, 16 * factor)).sum(0) % 2 * 200
    shrunk = np.asarray(resize_and_crop(Image.fromarray(checkers.astype(np.uint8)), 16))
    assert (shrunk == 100).all()


def test_the_rest_is_bicubic():
    image = Image.fromarray(noise(52, 50, 3))
    halved = image.resize((25, 26), Image.Resampling.BOX)
    expected = halved.resize((16, 17), Image.Resampling.BICUBIC).crop((0, 0, 16, 16))
    assert np.array_equal(np.asarray(resize_and_crop(image, 16)), np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(16, 21), (21, 16), (32, 43), (16, 16)])
def test_crop_takes_the_centre(height, width):
    pixels = noise(height, width, 3)
    image = Image.fromarray(pixels)
    if min(height, width) == 32:
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    top, left = (image.height - 16) // 2, (image.width - 16) // 2
    expected = np.asarray(image)[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(pixels), 16)), expected)


@pytest.mark.parametrize("side", [(3, 5), (1, 1), (1, 300), (17, 16), (31, 31), (33, 500), (257, 129)], ids=str)
def test_any_side_becomes_the_size(side):
    assert resize_and_crop(Image.fromarray(np.full((*side, 3), 77, np.uint8)), 16).size == (16, 16)
    assert (np.asarray(resize_and_crop(Image.fromarray(np.full((*side, 3), 77, np.uint8)), 16)) == 77).all()


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
    data = folder(tmp_path, mirror=True)
    stored = data.read(np.zeros(32, np.int64))[0]
    different = {image.numpy().tobytes() for image in data.to_images(stored, 0, torch.arange(32))}
    assert len(different) == 2


def test_gray_repeats_its_channel(tmp_path):
    pixels = noise(16, 16)
    png(tmp_path / "0.png", pixels)
    assert np.array_equal(one(tmp_path), np.stack([pixels] * 3, 2))


def test_transparency_is_dropped(tmp_path):
    pixels = noise(16, 16, 4)
    png(tmp_path / "0.png", pixels)
    assert np.array_equal(one(tmp_path), pixels[..., :3])


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
    with pytest.raises(ValueError, match="3 class folders, more than num_classes 2"):
        folder(tmp_path / "classes", num_classes=2)
    with pytest.raises(ValueError, match="no class folders, which num_classes 2 asks for"):
        folder(tmp_path / "loose", num_classes=2)


def test_without_pillow(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ValueError, match=r"pip install 'fastmask\[data\]'"):
        folder(tmp_path)
