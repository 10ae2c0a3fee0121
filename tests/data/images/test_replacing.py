"""Damaged images in training: what takes their place, whoever reads it, and what is said."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.console import get_console
from fastmask.data import batches, open_data, sample_ids
from fastmask.data.images.replacing import BadImages, read_or_replace
from fastmask.data.order import following

CPU = torch.device("cpu")
COUNT, SEED = 14, 3
DAMAGE = {
    "02.png": "it is empty, damaged or of another format",
    "05.jpg": "Truncated File Read",
    "06.png": "2000 x 1 pixels",
    "09.png": "Too many levels of symbolic links",
}


@pytest.fixture
def folder(tmp_path):
    """Fourteen images of two classes, each of one colour, of which four cannot be read."""
    for i in range(COUNT):
        file = tmp_path / "ab"[i >= 7] / f"{i:02}.{'jpg' if i == 5 else 'png'}"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(file)
    (tmp_path / "a" / "02.png").write_bytes(b"")
    (tmp_path / "a" / "05.jpg").write_bytes((tmp_path / "a" / "05.jpg").read_bytes()[:-40])
    Image.fromarray(np.zeros((1, 2000, 3), np.uint8)).save(tmp_path / "a" / "06.png")
    (tmp_path / "b" / "09.png").unlink()
    (tmp_path / "b" / "09.png").symlink_to("09.png")
    return tmp_path


def opened(folder, **more):
    options = {"image_size": 16, "num_classes": None, "flip": False, "decoder": "pil", "skip_seed": SEED}
    return open_data(str(folder), **{**options, **more})


def read(folder, start=0, stop=32, batch_size=8, num_workers=0, **more):
    """Return which images came, by their colours, their labels, and what was taken down."""
    bad = BadImages()
    settings = {"seed": SEED, "start": start, "stop": stop, "device": CPU, "bad_images": bad, **more}
    parts = list(batches(opened(folder), batch_size=batch_size, num_workers=num_workers, **settings))
    stored, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return stored[:, 0, 0, 0].tolist(), labels.tolist(), bad


def in_place_of(item):
    """Return the image that must come for an id, and how many are damaged on the way to it."""
    tried = 0
    while item in (2, 5, 6, 9):
        item, tried = following(SEED, item, COUNT), tried + 1
    return item, tried


@pytest.mark.parametrize("num_workers", [0, 2])
def test_others_take_the_place_whoever_reads_them(folder, capsys, num_workers):
    asked = sample_ids(SEED, 0, 32, COUNT).tolist()
    expected = [in_place_of(item) for item in asked]
    images, labels, bad = read(folder, num_workers=num_workers)
    assert images == [item for item, _ in expected]
    assert labels == [int(item >= 7) for item in images], "each has the label of its own"
    assert bad.count == sum(tried for _, tried in expected)
    said = capsys.readouterr().out.splitlines()
    for name, reason in DAMAGE.items():
        (line,) = [line for line in said if name in line]
        assert line.startswith("left out, and another image taken in its place: ")
        assert reason in line
    assert read(folder, start=8, batch_size=3, num_workers=num_workers)[0] == images[8:]
    (ours, _, our_bad), (theirs, _, their_bad) = (
        read(folder, batch_size=4, num_workers=num_workers, rank=rank, ranks=2) for rank in range(2)
    )
    steps = [ours[i : i + 4] + theirs[i : i + 4] for i in range(0, 16, 4)]
    assert [image for step in steps for image in step] == images
    assert our_bad.count + their_bad.count == bad.count


def test_an_image_takes_the_place_of_one_unless_damaged_ones_follow_each_other():
    size, bad = 100_000, set(range(0, 1000, 2))

    def reads(item):
        if item in bad:
            raise ValueError(f"{item} is damaged")
        return item, 0

    part = read_or_replace(reads, sorted(bad), seed=1, size=size)
    assert len(set(part.items)) == len(bad) - sum(following(1, item, size) in bad for item in bad) > 490
    assert not bad & set(part.items)
    assert part.items != read_or_replace(reads, sorted(bad), seed=2, size=size).items


@pytest.mark.parametrize(("size", "others"), [(1, 0), (3, 2), (1000, 16)])
def test_where_none_can_be_read_the_search_ends(size, others):
    tried = []

    def reads(item):
        tried.append(item)
        raise OSError(f"image {item} is gone")

    message = rf"image 0 is gone; nor can any of the {others} images that --on-bad skip tried in its place"
    with pytest.raises(ValueError, match=message):
        read_or_replace(reads, [0], seed=0, size=size)
    assert len(set(tried)) == len(tried) == others + 1


def test_each_process_names_what_it_meets_once(capsys, monkeypatch):
    monkeypatch.setattr(get_console(), "quiet", True)  # as of all but the first
    bad = BadImages()
    for _ in range(2):
        bad.add(4, [(1, "1.png is damaged"), (1, "1.png is damaged")])
    assert capsys.readouterr().out == "left out, and another image taken in its place: 1.png is damaged\n"
    assert bad.count == 4


def test_too_many_are_an_error_and_a_few_are_not():
    bad = BadImages()
    bad.add(10, [(i, f"{i}.png is damaged") for i in range(9)])  # of fewer than a hundred
    with pytest.raises(ValueError, match=r"11 of the 101 images that were read are damaged, .* 10%: .* 7\.png is dama"):
        bad.add(80, [(8, "8.png is damaged"), (7, "7.png is damaged")])
    bad = BadImages()
    for _ in range(9):
        bad.add(90, [(i, f"{i}.png is damaged") for i in range(10)])
    assert bad.count == 90


def test_a_first_image_that_is_damaged_is_no_end(folder):
    (folder / "a" / "00.png").write_bytes(b"")
    assert opened(folder).num_classes == 2
    with pytest.raises(ValueError, match=r"00\.png cannot be read .* \(fastmask.train --on-bad skip takes another"):
        opened(folder, skip_seed=None)


@pytest.mark.parametrize("data", ["digits", "synthetic", "pixels.npz"])
def test_what_decodes_nothing_has_nothing_to_skip(tmp_path, data):
    np.savez(tmp_path / "pixels.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    name = str(tmp_path / data) if data.endswith(".npz") else data
    with pytest.raises(ValueError, match=r"--on-bad skip is for images that are decoded at each visit, and --data "):
        opened(name, image_size=8)


def test_the_images_read_before_a_resume_count():
    """Else a job that is requeued gets past the limit."""
    bad = BadImages()
    bad.resume(read=90, bad=9)
    bad.add(8, [])
    with pytest.raises(ValueError, match="11 of the 100 images that were read are damaged, which is more than 10%"):
        bad.add(0, [(3, "x.png is damaged"), (4, "y.png is damaged")])
