"""Features in a store: written once, read with their images, flipped with them."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from stores import edit_manifest, manifest, write
from util import files_of_at_most

from fastmask.data import StoreDataset, batches
from fastmask.data.images.pixels import is_flipped
from fastmask.data.store.check import check_store
from fastmask.data.store.features import StoredFeatures, add_features, flip_grid
from fastmask.data.store.manifest import Features, read_manifest
from fastmask.data.store.reader import damaged_files
from fastmask.data.store.verify import Verifier

ABOUT = Features("teachers:small", "a" * 64, "float32 on cpu", 2, 6)
COUNT = 9  # one of ten items is left out


def values():
    return np.random.default_rng(1).standard_normal((COUNT, *ABOUT.shape)).astype(np.float16)


def computed(store, found=None, seen=None):
    """Return a function of a shard's features, in batches of two, which notes the numbers that it is asked for."""
    found = values() if found is None else found
    shards = read_manifest(store).shards
    starts = np.cumsum([0] + [shard.count for shard in shards])

    def compute(number):
        if seen is not None:
            seen.append(number)
        for first in range(starts[number], starts[number + 1], 2):
            yield found[first : min(first + 2, starts[number + 1])]

    return compute


@pytest.fixture(params=["moments", "pixels"])
def store(request, tmp_path):
    """A store of three shards, with features."""
    path = tmp_path / "store"
    write(path, manifest(request.param), skip=(5,))
    add_features(path, read_manifest(path), ABOUT, computed(path))
    return path


def opened(path, flip=False):
    about = read_manifest(path)
    return StoreDataset(path, about.image_size, None, flip)


def test_features_come_back_with_their_images(store):
    data = opened(store)
    features = StoredFeatures(data, False)
    assert (features.name, features.grid, features.width) == ("teachers:small", 2, 6)
    ids = np.array([8, 0, 3, 4, 0])
    read = features.reader(ids)
    assert read.dtype == torch.float16
    np.testing.assert_array_equal(read.numpy(), values()[ids])
    assert torch.equal(features.targets(torch.empty(0), read, 0, torch.arange(5)), read)
    assert sorted(path.name for path in store.glob("*.features*")) == [f"0000{i}.features.npy" for i in range(3)]
    np.testing.assert_array_equal(np.load(store / "00001.features.npy"), values()[4:7])


def test_a_flipped_grid_is_that_of_the_flipped_image():
    """For features that are the pixels of patches."""
    images = torch.randn(3, 1, 4, 4)
    patches = images.unfold(2, 1, 1).unfold(3, 1, 1).reshape(3, 16, 1)
    assert torch.equal(flip_grid(patches, 4), images.flip(3).reshape(3, 16, 1))


def test_features_of_flipped_images(store):
    data = opened(store, flip=True)
    features, ids, sample = StoredFeatures(data, True), np.arange(COUNT), torch.arange(COUNT) + 40
    plain = torch.from_numpy(values())
    if data.manifest.kind == "moments":  # flipped images have ids of their own
        assert len(data) == 2 * COUNT
        read = features.reader(ids + COUNT)
        assert torch.equal(read, flip_grid(plain, 2))
        assert torch.equal(features.reader(ids), plain)
        assert torch.equal(features.targets(torch.empty(0), read, 7, sample), read)
        return
    read = features.reader(ids)
    assert torch.equal(read, plain)
    targets = features.targets(torch.empty(0), read, 7, sample)
    stored = data.read(ids)[0]
    images, upright = data.to_images(stored, 7, sample), opened(store).to_images(stored, 7, sample)
    flipped = is_flipped(7, sample)
    assert 0 < flipped.sum() < COUNT
    for i in range(COUNT):
        assert torch.equal(images[i], upright[i].flip(2) if flipped[i] else upright[i])
        assert torch.equal(targets[i], flip_grid(plain[i : i + 1], 2)[0] if flipped[i] else plain[i])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_carry_them_until_they_end(store, num_workers):
    data = opened(store, flip=True)
    features = StoredFeatures(data, True)
    settings = {"batch_size": 2, "seed": 0, "start": 2, "stop": 12, "num_workers": num_workers}
    plain = list(batches(data, **settings, device=torch.device("cpu")))
    carried = list(batches(data, **settings, device=torch.device("cpu"), features=features.reader, features_stop=8))
    assert [len(batch) for batch in carried] == [3, 3, 3, 2, 2]
    for batch, alone in zip(carried, plain, strict=True):
        assert all(map(torch.equal, batch[:2], alone))
    found = torch.cat([batch[2] for batch in carried[:3]])
    both = torch.cat([torch.from_numpy(values()), flip_grid(torch.from_numpy(values()), 2)])
    assert all((both == one).all(-1).all(-1).any() for one in found)


def test_a_store_without_features_says_how_to_add_them(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(
        ValueError, match=r"holds no features: python -m fastmask.prepare .*store --features TEACHER adds"
    ):
        StoredFeatures(opened(tmp_path / "store"), False)
    assert "features" not in (tmp_path / "store" / "manifest.json").read_text()


def test_the_fingerprint_is_that_of_the_images(store, tmp_path):
    """A run resumes with a store to which features were added; its features have a hash of their own."""
    bare = tmp_path / "bare"
    write(bare, manifest(read_manifest(store).kind), skip=(5,))
    assert opened(store).fingerprint() == opened(bare).fingerprint()
    other = tmp_path / "other"
    write(other, manifest(read_manifest(store).kind), skip=(5,))
    add_features(other, read_manifest(other), ABOUT, computed(other, values() + np.float16(1)))
    identities = {StoredFeatures(opened(path), False).identity for path in (store, other)}
    assert len(identities) == 2
    shutil.copytree(store, tmp_path / "copy")
    assert StoredFeatures(opened(tmp_path / "copy"), False).identity in identities


def test_an_interrupted_writer_resumes(store, tmp_path):
    """With the same bytes; shards of other features are written again."""
    path, seen = tmp_path / "again", []
    write(path, manifest(read_manifest(store).kind), skip=(5,))
    compute = computed(path, seen=seen)

    def fails(number):
        if number == 2:
            raise KeyboardInterrupt
        yield from compute(number)

    with pytest.raises(KeyboardInterrupt):
        add_features(path, read_manifest(path), ABOUT, fails)
    assert read_manifest(path).features is None
    add_features(path, read_manifest(path), ABOUT, compute)
    assert seen == [0, 1, 2]
    for file in store.iterdir():
        if file.name != ".lock":
            assert (path / file.name).read_bytes() == file.read_bytes(), file.name
    # Half done for another teacher, and one of its files cut.
    third, seen[:] = tmp_path / "third", []
    write(third, manifest(read_manifest(store).kind), skip=(5,))
    with pytest.raises(KeyboardInterrupt):
        add_features(third, read_manifest(third), dataclasses.replace(ABOUT, teacher="timm:other"), fails)
    add_features(third, read_manifest(third), ABOUT, compute)
    assert seen == [0, 1, 0, 1, 2]
    assert (third / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "store"
    write(path)
    before = read_manifest(path)
    few = values()[:, :3]
    with pytest.raises(ValueError, match=r"features of float16 \(3, 6\) are not \(4, 6\) of float16"):
        add_features(path, before, ABOUT, computed(path, few))
    with pytest.raises(ValueError, match="shard 0 holds 4 images, and 2 were given"):
        add_features(path, before, ABOUT, lambda number: [values()[:2]])
    bad = values()
    bad[1, 2, 3] = np.inf
    with pytest.raises(ValueError, match="teachers:small gives features that are not finite in float16"):
        add_features(path, before, ABOUT, computed(path, bad))
    with files_of_at_most(200), pytest.raises(ValueError, match=r"cannot be written: .*the same command resumes"):
        add_features(path, before, ABOUT, computed(path))
    assert read_manifest(path) == before
    assert not list(path.glob("*.features*"))
    (path / "00001.npy").rename(path / "00002.features.npy")
    edit_manifest(path, lambda fields: fields["shards"][1]["records"].update(name="00002.features.npy"))
    with pytest.raises(ValueError, match=r"00002\.features\.npy is a file of the store already"):
        add_features(path, read_manifest(path), ABOUT, computed(path))


def test_damage_is_found(store):
    about = read_manifest(store)
    file = store / "00001.features.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert list(damaged_files(store, about)) == [f"{file} is damaged: its SHA-256 is not that of the manifest"]
    assert check_store(store).damaged == [f"{file} is damaged: its SHA-256 is not that of the manifest"]
    verifier = Verifier(store, about)
    verifier.start()
    verifier._thread.join()
    with pytest.raises(ValueError, match=r"00001.features.npy is damaged"):
        verifier.poll()
    content[-1], content[-2] = 0x7C, 0x00  # infinity
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001.features.npy: features of record 2 are not finite"):
        StoredFeatures(opened(store), False).reader(np.array([0, 6]))
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"00001.features.npy has 271 bytes instead of 272"):
        opened(store)
    file.unlink()
    with pytest.raises(ValueError, match=r"00001.features.npy is missing from the store"):
        opened(store)


def test_a_header_that_contradicts_the_manifest(store):
    file = store / "00000.features.npy"
    content = bytearray(file.read_bytes())
    place = content.index(b"(4, 4, 6)")
    content[place : place + 9] = b"(4, 6, 4)"
    file.write_bytes(content)
    edit_manifest(store, lambda fields: None)
    with pytest.raises(ValueError, match=r"holds float16 of shape \(4, 6, 4\) by its header, and float16 of shape"):
        StoredFeatures(opened(store), False).reader(np.array([0]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda fields: fields["shards"][1].pop("features"),
            "features are of all shards, and are described, or of none",
        ),
        (lambda fields: fields.pop("features"), "features are of all shards, and are described, or of none"),
        (lambda fields: fields["features"].update(width=7), "00000.features.npy of 320 bytes cannot hold 4 records"),
        (lambda fields: fields["features"].update(grid=0), "Expected int >= 1 at features.grid"),
        (lambda fields: fields["features"].update(sha256="x"), "Expected a SHA-256 at features.sha256"),
        (
            lambda fields: fields["shards"][0]["features"].update(name="../x.npy"),
            "the name of an .npy in the store's own",
        ),
        (lambda fields: fields["shards"][0]["features"].update(name="00001.features.npy"), "is named twice"),
    ],
)
def test_a_manifest_that_contradicts_itself(store, edit, message):
    edit_manifest(store, edit)
    with pytest.raises(ValueError, match=message):
        read_manifest(store)


def test_the_check_describes_them(store):
    assert "features of teachers:small, sha256 aaaaaaaaaaaa, 2 x 2 patches of 6 values" in check_store(store).lines
