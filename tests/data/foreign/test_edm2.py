import json
import os
import zipfile

import numpy as np
import pytest
from latent_files import EDM2_MEAN, EDM2_STD, edm2_of, everything, raw_moments, zipped

from fastmask.data.foreign.edm2 import Edm2, is_edm2
from fastmask.data.foreign.open import open_latents

# Channel means of Stable Diffusion's latents of ImageNet, of images in [-1, 1].
REPA_MEAN = np.float32([0.86, -0.28, 0.22, 0.37])


@pytest.mark.parametrize("packed", [False, True])
def test_edm2(tmp_path, packed):
    raw = raw_moments(6, EDM2_MEAN, EDM2_STD)
    raw[0, 4] = 0
    latents = open_latents(edm2_of(tmp_path / "edm2", raw, packed=packed))
    records, labels = everything(latents)
    assert (latents.kind, latents.holds, labels) == ("edm2", "moments", [0, 1, 2, 3, 4, 5])
    assert np.array_equal(records[:, 0, :4], raw[:, :4])
    np.testing.assert_allclose(np.exp(records[:, 0, 4:] / 2), raw[:, 4:], rtol=1e-5, atol=1e-12)
    assert np.isfinite(records).all()
    # What EDM2 trains on: (latent - 5.81) * 0.5 / 4.17 in the first channel.
    assert (latents.scaled_by.scale[0], latents.scaled_by.shift[0]) == (pytest.approx(0.5 / 4.17), 5.81)
    (note,) = latents.notes
    assert note.startswith("taken for edm2, by the mean of channels ")
    assert note.endswith("(EDM2's 5.81 3.25 0.12 -2.15, REPA's about 0); --latents decides otherwise")
    assert latents.downsampling == 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mean", [REPA_MEAN, np.zeros(4), -REPA_MEAN])
def test_latents_of_repa_are_told_from_edm2s(tmp_path, packed, mean):
    """They have the same layout, and were trained on with EDM2's shift, channel 0 at -0.7 instead of about 0."""
    raw = raw_moments(64, mean, EDM2_STD)
    latents = open_latents(edm2_of(tmp_path / "repa", raw, packed=packed))
    assert (latents.kind, latents.scaled_by.scale, latents.scaled_by.shift) == ("repa", 0.18215, 0.0)
    assert latents.vae == "stabilityai/sd-vae-ft-mse, of images in [-1, 1]"
    assert latents.notes[0].startswith("taken for repa, by the mean of channels ")


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6])
def test_latents_of_a_mean_between_are_refused_without_a_flag(tmp_path, share):
    path = edm2_of(tmp_path / "some", raw_moments(20, share * EDM2_MEAN))
    latents = open_latents(path)
    assert latents.scaled_by is None
    assert latents.unscaled.endswith("REPA's about 0: give --latents edm2 or --latents repa")
    for variant, scale in (("repa", 0.18215), ("edm2", [0.5 / std for std in (4.17, 4.62, 3.71, 3.28)])):
        latents = open_latents(path, variant)
        assert (latents.kind, latents.scaled_by.scale) == (variant, scale)
        assert latents.notes == [f"taken for {variant}, as --latents says"]


def test_the_flag_decides_against_the_mean_and_says_so(tmp_path):
    latents = open_latents(edm2_of(tmp_path / "edm2", raw_moments(20, EDM2_MEAN)), "repa")
    assert (latents.kind, latents.scaled_by.scale) == ("repa", 0.18215)
    assert latents.notes[1].startswith("warning: the mean of channels 5.")
    assert "is that of edm2" in latents.notes[1]


def test_latents_of_another_vae(tmp_path):
    raw = raw_moments(5, np.zeros(16), channels=16)
    latents = open_latents(edm2_of(tmp_path / "wide", raw))
    assert (latents.kind, latents.scaled_by, latents.downsampling) == ("edm2-layout", None, None)
    assert latents.unscaled == "scale and shift of latents of 16 channels are not known"
    assert everything(latents)[0].shape == (5, 1, 32, 4, 4)


def test_files_that_are_not_listed(tmp_path):
    path = edm2_of(tmp_path / "edm2", raw_moments(3, EDM2_MEAN))
    np.save(path / "00000" / "more.npy", np.zeros(3))
    line = "left out: 1 .npy files that dataset.json does not list (00000/more.npy, ...)"
    assert open_latents(path).notes[0] == line
    assert open_latents(zipped(path)).notes[0] == line


def test_a_record_that_is_damaged_does_not_decide(tmp_path):
    path = edm2_of(tmp_path / "edm2", raw_moments(4, EDM2_MEAN))
    np.save(path / "00000" / "img-mean-std-00000001.npy", np.full((8, 4, 4), np.inf, np.float32))
    np.save(path / "00000" / "img-mean-std-00000003.npy", np.zeros((6, 4, 4), np.float32))
    (path / "00000" / "img-mean-std-00000000.npy").write_bytes(b"")
    assert open_latents(path).kind == "edm2"
    for number in range(4):
        (path / "00000" / f"img-mean-std-0000000{number}.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"img-mean-std-00000000\.npy cannot be read as an \.npy"):
        open_latents(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((8, 4), np.float32), r"holds no latent, but float32 of shape \(8, 4\)"),
        (np.zeros((7, 4, 4), np.float32), r"holds no latent, but float32 of shape \(7, 4, 4\)"),
        (np.zeros((8, 4, 4), int), "holds no latent, but int64"),
        (np.full((8, 4, 4), -1, np.float32), "holds -1 where a deviation should be"),
        (np.array([{}], object), r"cannot be read as an \.npy of numbers"),
        (b"cut", r"cannot be read as an \.npy"),
    ],
)
def test_a_record_that_is_none(tmp_path, packed, value, message):
    path = edm2_of(tmp_path / "edm2", raw_moments(4, EDM2_MEAN))
    file = path / "00000" / "img-mean-std-00000002.npy"
    if isinstance(value, bytes):
        file.write_bytes(value)
    else:
        np.save(file, value, allow_pickle=True)
    latents = open_latents(zipped(path) if packed else path)
    with pytest.raises(ValueError, match=rf"edm2(\.zip)?:00000/img-mean-std-00000002\.npy {message}"):
        latents.read(2)


def test_a_pipe_and_a_file_that_is_gone(tmp_path):
    path = edm2_of(tmp_path / "edm2", raw_moments(4, EDM2_MEAN))
    (path / "00000" / "img-mean-std-00000001.npy").unlink()
    (path / "00000" / "img-mean-std-00000002.npy").unlink()
    os.mkfifo(path / "00000" / "img-mean-std-00000002.npy")
    latents = open_latents(path)
    with pytest.raises(FileNotFoundError):
        latents.read(1)
    with pytest.raises(ValueError, match="is not a regular file"):
        latents.read(2)


@pytest.mark.parametrize("name", ["../x.npy", "a/../../x.npy", "/x.npy", "a/..", "a\\x.npy", "x\0.npy"])
def test_names_that_lead_elsewhere(tmp_path, name):
    path = edm2_of(tmp_path / "deep" / "edm2", raw_moments(2, EDM2_MEAN))
    np.save(tmp_path / "deep" / "x.npy", raw_moments(1, EDM2_MEAN)[0])
    (path / "dataset.json").write_text(json.dumps({"labels": [["00000/img-mean-std-00000000.npy", 0], [name, 1]]}))
    for source in (path, zipped(path)):
        with pytest.raises(ValueError, match=r"dataset\.json names .*, which is not a file in the folder"):
            open_latents(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"labels": null}', "lists no labels"),
        ("{}", "lists no labels"),
        ("", "cannot be read: Input data was truncated"),
        ("[]", "cannot be read: Expected object, got array"),
        ('{"labels": 3}', "cannot be read: Expected array | null, got int"),
        ('{"labels": [3]}', "cannot be read"),
        ('{"labels": [["a.npy", true]]}', "cannot be read: Expected int, got bool"),
        ('{"labels": [["a.npy", 1.5]]}', "cannot be read: Expected int, got float"),
        ('{"labels": [["a.npy", "1"]]}', "cannot be read: Expected int, got str"),
        ('{"labels": [["a.npy", [0, 1]]]}', "cannot be read: Expected int, got array"),
        ('{"labels": [["a.npy"]]}', "cannot be read"),
        ('{"labels": [["a.npy", -1]]}', r"dataset\.json: a\.npy has label -1, which is outside"),
        ('{"labels": [["a.npy", 4294967297]]}', r"dataset\.json: a\.npy has label 4294967297, which is outside"),
        ('{"labels": [["a.npy", ' + "9" * 5000 + "]]}", "cannot be read"),
        ('{"labels": ' + "[" * 100_000, "cannot be read"),
    ],
    ids=range(15),
)
def test_a_list_that_is_damaged(tmp_path, content, message):
    path = edm2_of(tmp_path / "edm2", raw_moments(2, EDM2_MEAN))
    (path / "dataset.json").write_text(content)
    for source in (path, zipped(path)):
        with pytest.raises(ValueError, match=message) as error:
            open_latents(source)
        assert "\n" not in str(error.value)


def test_a_member_that_inflates(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmask.data.foreign.edm2.MAX_RECORD_BYTES", 10**6)
    path = edm2_of(tmp_path / "edm2", raw_moments(2, EDM2_MEAN), packed=True)
    bomb = tmp_path / "edm2" / "bomb.zip"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        for name in whole.namelist():
            file.writestr(name, bytes(10**7) if name.endswith("1.npy") else whole.read(name))
    with pytest.raises(
        ValueError, match=r"1\.npy cannot be read: it has 10,000,000 bytes, above the limit of 1,000,000"
    ):
        Edm2(bomb).read(1)


def test_what_is_not_in_this_layout(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "b.zip").write_bytes(b"x")
    (tmp_path / "dataset.json").write_text("{}")  # as beside images
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("dataset.json", "{}")
        file.writestr("a.png", "")
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("", "b.zip", "images.zip", "pipe.zip", "gone"):
        assert not is_edm2(tmp_path / name)
