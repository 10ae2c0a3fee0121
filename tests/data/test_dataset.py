import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import open_data
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.in_memory import Digits, ImageArray, Moments, Synthetic


def opened(data, image_size=16, num_classes=None, flip=False):
    return open_data(str(data), image_size=image_size, num_classes=num_classes, flip=flip)


@pytest.fixture
def sources(tmp_path):
    """One dataset of each kind, by its type."""
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(4))
    np.savez(tmp_path / "moments.npz", moments=np.zeros((4, 8, 2, 2), np.float16), labels=np.arange(4))
    for label in "ab":
        (tmp_path / "folder" / label).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "folder" / label / "0.png")
    return {
        Digits: "digits",
        Synthetic: "synthetic",
        ImageDataset: tmp_path / "folder",
        ImageArray: tmp_path / "images.npz",
        Moments: tmp_path / "moments.npz",
    }


@pytest.mark.parametrize("kind", [Digits, Synthetic, ImageDataset, ImageArray, Moments])
def test_each_kind_by_its_name(sources, kind):
    data = opened(sources[kind], image_size=8 if kind is Digits else 16)
    assert isinstance(data, kind)
    ids = np.array([0, 1])
    stored, labels = data.read(ids)
    images = data.to_images(stored, 0, torch.from_numpy(ids))
    assert images.shape == (2, *data.shape)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert len(data.class_names) == data.num_classes


@pytest.mark.parametrize("kind", [Digits, Synthetic, ImageDataset, ImageArray, Moments])
def test_no_classes_leave_the_labels_out(sources, kind):
    data = opened(sources[kind], image_size=8 if kind is Digits else 16, num_classes=0)
    assert (data.num_classes, data.class_names) == (0, [])
    assert data.read(np.arange(2))[1].tolist() == [0, 0]


def test_no_classes_need_no_labels(tmp_path, capsys):
    """Those of a test split are -1."""
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("0.png", image.getvalue()), ("0.cls", b"-1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"label -1 is below 0, .*--num-classes 0 takes the images without labels"):
        opened(tmp_path / "0.tar")
    assert opened(tmp_path / "0.tar", num_classes=0).read(np.arange(1))[1].tolist() == [0]
    assert f"{tmp_path}/0.tar: webdataset, 1 images, no classes (--num-classes 0)" in capsys.readouterr().out


def test_arrays_at_their_own_side(sources):
    data = open_data(str(sources[ImageArray]), image_size=8, num_classes=None, flip=False, keep_side=True)
    assert data.shape == (3, 16, 16)
    folder = open_data(str(sources[ImageDataset]), image_size=8, num_classes=None, flip=False, keep_side=True)
    assert folder.shape == (3, 8, 8)


@pytest.mark.parametrize("kind", [ImageDataset, ImageArray, Moments])
def test_more_classes_than_labels(sources, kind):
    data = opened(sources[kind], num_classes=9)
    assert data.num_classes == len(data.class_names) == 9


def test_nothing_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere does not exist: `python -m fastmask.prepare IMAGES .*nowhere --image-size 256`"
    ):
        opened(tmp_path / "nowhere", image_size=256)


@pytest.mark.parametrize(
    ("name", "said"),
    [("data.tar", "cannot be read as a tar"), ("data.npy", "is no folder, "), ("data", "is no folder, ")],
)
def test_another_kind_of_file(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=f"{name} {said}"):
        opened(tmp_path / name)


@pytest.mark.parametrize("image_size", [0, -8])
@pytest.mark.parametrize("kind", [Synthetic, ImageDataset, ImageArray, Moments])
def test_no_image_size(sources, kind, image_size):
    with pytest.raises(ValueError, match=f"image_size must be at least 1, not {image_size}"):
        opened(sources[kind], image_size=image_size)


@pytest.mark.parametrize("kind", [Digits, Synthetic, ImageDataset, ImageArray, Moments])
def test_fewer_classes_than_none(sources, kind):
    with pytest.raises(ValueError, match="num_classes must be at least 0, not -1"):
        opened(sources[kind], image_size=8, num_classes=-1)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ImageArray, "images.npz: npz, 4 images, 4 classes, resized and cropped from 16 x 16 to 32 x 32\n"),
        (
            Moments,
            "moments.npz: 4 moments (8, 2, 2) of images downsampled by 8, 4 classes, scale 0.18215, shift 0 (Stable "
            "Diffusion's KL-f8, since the file holds no `scale` and `shift`)\n",
        ),
    ],
)
def test_what_is_recognised_is_said(sources, kind, said, capsys):
    opened(sources[kind], image_size=32 if kind is ImageArray else 16)
    assert capsys.readouterr().out == f"{sources[kind].parent}/{said}"
