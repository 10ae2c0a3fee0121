import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data.images.pixels import SUFFIXES, decode, resize_and_crop
from fastmask.data.in_memory import ImageArray
from fastmask.kernels import random_uniform

PATH = Path("some.npz")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def array(images, image_size=16, flip=False, **labels):
    return ImageArray(PATH, {"images": images, **labels}, image_size, flip)


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


def test_flipping_is_a_function_of_seed_and_global_index():
    images = noise(64, 16, 16, 3)
    data = array(images, flip=True)
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


@pytest.mark.parametrize("side", [(3, 5), (1, 1), (1, 20), (60, 3), (17, 16), (31, 31), (33, 500), (257, 129)], ids=str)
def test_any_side_becomes_the_size(side):
    assert resize_and_crop(Image.fromarray(np.full((*side, 3), 77, np.uint8)), 16).size == (16, 16)
    assert (np.asarray(resize_and_crop(Image.fromarray(np.full((*side, 3), 77, np.uint8)), 16)) == 77).all()


def content_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# What each value of Exif's orientation does to what is stored, in its own words: where row 0 and column 0 are seen.
SEEN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("turned", SEEN)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_an_image_is_turned_as_its_exif_says(kind, turned):
    stored = noise(16, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = turned
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    content = content_of(Image.fromarray(stored), kind, exif=exif.tobytes(), **options)
    if kind == "JPEG":
        stored = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode(content, 16, "it"), SEEN[turned](stored))


def test_a_turned_image_is_cropped_as_it_is_seen():
    stored = noise(16, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = content_of(Image.fromarray(stored), "PNG", exif=exif.tobytes())
    assert np.array_equal(decode(content, 16, "it"), SEEN[6](stored)[12:28])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize(
    "exif",
    [b"", b"Exif", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0", b"nonsense"],
)
def test_exif_that_cannot_be_read_turns_nothing(exif):
    stored = noise(16, 16, 3)
    assert np.array_equal(decode(content_of(Image.fromarray(stored), "PNG", exif=exif), 16, "it"), stored)


def tag(value, kind=3):
    """Return Exif whose orientation has any value, and any type."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + kind.to_bytes(2, "big") + b"\0\0\0\x01" + value + b"\0\0\0\0"


@pytest.mark.parametrize("exif", [tag(b"\0\0\0\0"), tag(b"\0\x09\0\0"), tag(b"6\0\0\0", 2), tag(b"\0\0\0\x06", 5)])
def test_an_orientation_that_there_is_not_turns_nothing(exif):
    stored = noise(16, 16, 3)
    assert np.array_equal(decode(content_of(Image.fromarray(stored), "PNG", exif=exif), 16, "it"), stored)


def over_white(pixels, alpha):
    alpha = alpha[..., None] / 255
    return np.rint(pixels * alpha + 255 * (1 - alpha))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_lie_over_white(kind):
    pixels = noise(16, 16, 4)
    pixels[:8, :8, 3], pixels[8:, 8:, 3] = 0, 255
    content = content_of(Image.fromarray(pixels), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    found = decode(content, 16, "it").astype(int)
    assert np.abs(found - over_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    assert (found[:8, :8] == 255).all()
    assert np.array_equal(found[8:, 8:], pixels[8:, 8:, :3])


def test_transparent_greys_palettes_and_colours_lie_over_white():
    pixels = noise(16, 16)
    pixels[3, :5] = 200
    grey = Image.merge("LA", [Image.fromarray(pixels), Image.fromarray(np.where(pixels < 99, 0, 255).astype(np.uint8))])
    keyed = {"transparency": 7}
    for content, clear in [
        (content_of(grey, "PNG"), pixels < 99),
        (content_of(Image.fromarray(pixels), "PNG", transparency=200), pixels == 200),
        (content_of(Image.fromarray(pixels.astype(np.uint16) * 257), "PNG", transparency=200 * 257), pixels == 200),
    ]:
        expected = np.where(clear, 255, pixels)
        assert np.array_equal(decode(content, 16, "it"), np.stack([expected] * 3, 2))
    colours = noise(16, 16, 3)
    key = tuple(colours[3, 4].tolist())
    found = decode(content_of(Image.fromarray(colours), "PNG", transparency=key), 16, "it")
    assert np.array_equal(found, np.where((colours == key).all(2, keepdims=True), 255, colours))
    palette = Image.fromarray(colours).quantize(16)
    for kind in ("PNG", "GIF"):
        found = decode(content_of(palette, kind, **keyed), 16, "it")
        clear = (np.asarray(palette) == 7)[..., None]
        assert clear.any()
        assert np.array_equal(found, np.where(clear, 255, np.asarray(palette.convert("RGB"))))


def test_no_format_is_read_but_those_that_are_named():
    """Of another, such as EPS, Pillow would call a program, whatever the file's suffix is."""
    eps = content_of(Image.fromarray(noise(16, 16, 3)), "EPS")
    with pytest.raises(
        ValueError, match=r"^a\.png cannot be read as an image: it is empty, damaged or of another format$"
    ):
        decode(eps, 16, "a.png")
    for suffix in SUFFIXES:
        kind = Image.registered_extensions()[suffix]
        assert decode(content_of(Image.new("RGB", (16, 16)), kind), 16, f"a{suffix}").shape == (16, 16, 3)


@pytest.mark.parametrize("side", [(1, 2000), (2000, 1), (21, 1), (41, 2)], ids=str)
def test_strips_are_refused(side):
    """Before they are decoded or enlarged: a PNG of 20000 x 1 pixels has 140 bytes, and would take gigabytes."""
    width, height = side
    said = rf"it has {width} x {height} pixels: one side is more than 20 times the other"
    with pytest.raises(ValueError, match=rf"^a\.png cannot be read as an image: {said}$"):
        decode(content_of(Image.new("L", side), "PNG"), 256, "a.png")
    with pytest.raises(ValueError, match=said):
        array(np.zeros((1, height, width, 3), np.uint8))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of tags that Pillow skips
def test_damage_of_any_kind_is_one_line():
    """Flipped bits and files that end anywhere, in formats whose readers raise all kinds of errors."""
    random, refused = np.random.default_rng(0), 0
    kinds = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    contents = [content_of(Image.fromarray(noise(16, 16, 3)), kind) for kind in kinds]
    contents.append(content_of(Image.fromarray(noise(16, 16, 3)), "TIFF", compression="tiff_lzw"))
    for content in contents:
        for _ in range(150):
            changed = bytearray(content)
            changed[int(random.integers(min(200, len(content))))] ^= 1 << int(random.integers(8))
            if random.random() < 0.2:
                changed = changed[: int(random.integers(len(changed)))]
            try:
                assert decode(bytes(changed), 16, "it").shape == (16, 16, 3)
            except ValueError:
                refused += 1
    assert refused > 150


@pytest.mark.once
def test_no_small_file_takes_much_memory():
    """Strips, which would be enlarged, and a PNG that claims more pixels than it holds."""
    program = """
import resource, struct, zlib
from fastmask.data.images.pixels import decode

def png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(5000))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(packed)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

assert decode(png(60, 60), 256, "it").shape == (256, 256, 3)
before = peak()
for side in ((4000, 1), (1, 4000), (60_000, 60_000)):
    try:
        decode(png(*side), 256, "it")
    except ValueError as error:
        print(error)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, grown = done.stdout.splitlines()
    assert len(lines) == 3
    assert int(grown) < 20_000  # KiB
