import numpy as np
import pytest
import torch
from latent_files import edm2_of, features_of, latent_tar_of, lmdb_of, moments_of, raw_moments, shards_of, tar_of
from safetensors.torch import save_file

from fastmask.data.foreign.open import HalfRecords, layout_of, open_latents

MOMENTS, LABELS = moments_of(4), [0, 1, 0, 2]


def test_every_layout_is_told(tmp_path):
    np.savez(tmp_path / "some.npz", moments=MOMENTS)
    features_of(tmp_path / "fast", MOMENTS[:, :4], LABELS)
    layouts = {
        latent_tar_of(tmp_path / "0.tar", MOMENTS, LABELS): "maskdit-webdataset",
        tmp_path / "fast": "fast-dit",
        edm2_of(tmp_path / "edm2", raw_moments(4, np.zeros(4))): "edm2-layout",
        shards_of(tmp_path / "light", MOMENTS, LABELS): "lightningdit",
        tmp_path / "some.npz": "npz-moments",
    }
    assert {path: layout_of(path) for path in layouts} == layouts
    kinds = {path: open_latents(path).kind for path in layouts}
    assert kinds == {**layouts, tmp_path / "edm2": "repa"}


def test_an_lmdb_is_told(tmp_path):
    assert layout_of(lmdb_of(tmp_path / "train", MOMENTS, LABELS)) == "maskdit-lmdb"


def test_what_holds_no_latents(tmp_path):
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    (tmp_path / "folder" / "cat" / "0.png").write_bytes(b"")
    np.save(tmp_path / "folder" / "statistics.npy", MOMENTS)
    tar_of(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"0"})
    (tmp_path / "b.tar").write_bytes(b"x")
    (tmp_path / "b.zip").write_bytes(b"x")
    (tmp_path / "b.npz").write_bytes(b"x")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    names = ["folder", "a.tar", "b.tar", "b.zip", "b.npz", "images.npz", "train-images-idx3-ubyte", "empty", "gone"]
    for name in names:
        assert open_latents(tmp_path / name) is None
        assert layout_of(tmp_path / name) == ""


@pytest.mark.parametrize("beside", [None, "readme.md"])
@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("a/x.npy", MOMENTS, r"a/x\.npy: float32 of shape \(4, 8, 4, 4\)"),
        ("x.npy", b"cut", r"x\.npy: a \.npy of another kind"),
        ("x.pt", b"", r"x\.pt: a \.pt of another kind"),
        ("x.safetensors", {"z": torch.zeros(3, 4)}, r"x\.safetensors: z F32 \[3, 4\]"),
        ("x.safetensors", b"cut", r"x\.safetensors: a \.safetensors of another kind"),
    ],
)
def test_latents_in_another_layout_are_named(tmp_path, name, value, found, beside):
    path = tmp_path / "some" / name
    path.parent.mkdir(parents=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif isinstance(value, dict):
        save_file(value, path)
    else:
        np.save(path, value)
    if beside:
        (tmp_path / "some" / beside).write_text("")
    message = rf"some holds arrays in no layout that is known \({found}\); known are MaskDiT's LMDB or tars, fast-DiT's"
    with pytest.raises(ValueError, match=message):
        open_latents(tmp_path / "some")
    with pytest.raises(ValueError, match="holds arrays in no layout that is known"):
        open_latents(path)


def test_the_flag_of_a_layout_is_not_for_others(tmp_path):
    features_of(tmp_path, MOMENTS[:, :4], LABELS)
    with pytest.raises(ValueError, match=r"--latents repa decides between projects with EDM2's layout: .* is fast-dit"):
        open_latents(tmp_path, "repa")
    with pytest.raises(ValueError, match=r"--latents repa decides .* is no latents"):
        open_latents(tmp_path / "gone", "repa")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((4, 4, 4), np.nan), "2.npy holds values that are not finite in float16"),
        (np.full((4, 4, 4), 1e6), "2.npy holds values that are not finite in float16"),
        (np.zeros((4, 5, 4)), r"2.npy holds a latent of shape \(4, 5, 4\) in 1 copies, not \(4, 4, 4\) in 1 as others"),
    ],
)
def test_records_that_a_store_cannot_hold(tmp_path, value, message):
    folder, _ = features_of(tmp_path, MOMENTS[:, :4], LABELS)
    np.save(folder / "2.npy", value[None].astype(np.float32))
    read = HalfRecords(open_latents(tmp_path), (1, 4, 4, 4), 1)
    record, label = read(3)
    assert (record.dtype, record.shape, label) == (np.float16, (1, 4, 4, 4), 2)
    with pytest.raises(ValueError, match=message):
        read(2)


def test_copies_may_be_left_out(tmp_path):
    latents = open_latents(shards_of(tmp_path, MOMENTS, LABELS))
    assert np.array_equal(HalfRecords(latents, (2, 8, 4, 4), 1)(1)[0], latents.read(1)[0][:1].astype(np.float16))
