import collections
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from latent_files import everything, moments_of, shards_of
from safetensors.torch import load_file, save_file

from fastmask.data.foreign.lightning import describe_safetensors, latent_shards, read_statistics
from fastmask.data.foreign.open import open_latents
from fastmask.data.images.reader import read_ahead

LATENTS = 3 * moments_of(10, channels=32) + 1
LABELS = [i % 4 for i in range(10)]


@pytest.mark.parametrize("flipped", [True, False])
def test_shards(tmp_path, flipped):
    path = shards_of(tmp_path / "light", LATENTS, LABELS, flipped)
    latents = open_latents(path)
    assert (latents.kind, latents.holds, len(latents), latents.downsampling) == ("lightningdit", "latents", 10, None)
    records, labels = everything(pickle.loads(pickle.dumps(latents)))
    assert np.array_equal(records[:, 0], LATENTS)
    assert records.shape[1] == 1 + flipped
    assert not flipped or np.array_equal(records[:, 1], LATENTS[..., ::-1] + 1)
    assert labels == LABELS
    flips = "with" if flipped else "without"
    assert latents.notes == [f"3 shards, {flips} latents of flipped images (latents_flip)"]
    assert latents.name(5) == f"{path}/latents_rank00_shard001.safetensors, latent 1"
    parts = read_ahead(latents.read, latents.name, [range(3), range(3, 10)], num_workers=2)
    assert np.array_equal(np.concatenate([part.values for part in parts]), records)
    # As LightningDiT: (latent - mean) / std of each channel.
    mean, std = LATENTS.mean((0, 2, 3)), LATENTS.std((0, 2, 3), ddof=1)
    np.testing.assert_allclose(latents.scaled_by.shift, mean, rtol=1e-5)
    np.testing.assert_allclose(latents.scaled_by.scale, 1 / std, rtol=1e-5)
    assert latents.scaled_by.source == "latents_stats.pt, to a mean of 0 and a deviation of 1"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(tmp_path, dtype):
    latents = open_latents(shards_of(tmp_path, LATENTS, LABELS, dtype=dtype))
    np.testing.assert_allclose(everything(latents)[0][:, 0], LATENTS, rtol=1e-2)


def test_one_shard_and_no_statistics(tmp_path):
    path = shards_of(tmp_path, LATENTS, LABELS, statistics=False) / "latents_rank00_shard001.safetensors"
    latents = open_latents(path)
    assert (len(latents), latents.scaled_by) == (4, None)
    assert latents.unscaled == f"{tmp_path / 'latents_stats.pt'} is not there"


def edit(path, **tensors):
    found = load_file(path)
    save_file({**found, **{name: value for name, value in tensors.items() if value is not None}}, path)
    for name in [name for name, value in tensors.items() if value is None]:
        found = load_file(path)
        del found[name]
        save_file(found, path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"labels": None}, "holds no `labels`, but latents, latents_flip"),
        ({"latents_flip": None}, "holds no `latents_flip`, but labels, latents"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"`latents` is F32 of shape \[4, 32, 4, 4\], which does not fit",
        ),
        ({"labels": torch.zeros(4)}, r"`labels` is F32 of shape \[4\], which does not fit the others"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, r"`labels` is I64 of shape \[4, 1\]"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, "latent 2 has label -1, which is outside"),
        ({"labels": torch.tensor([0, 2**32 + 1, 1, 2])}, "latent 1 has label 4294967297, which is outside"),
        ({"latents": torch.zeros(4, 32, 4, 5)}, r"`latents` is F32 of shape \[4, 32, 4, 5\]"),
        ({"latents": torch.zeros(4, 16, 4, 4)}, r"`latents` is F32 of shape \[4, 16, 4, 4\]"),
        ({"latents": torch.zeros(4, 32, 4, 4, dtype=torch.int32)}, "`latents` is I32"),
        ({"latents_flip": torch.zeros(4, 32, 4, 5)}, "`latents_flip` is F32"),
    ],
)
def test_a_shard_that_does_not_fit(tmp_path, tensors, message):
    path = shards_of(tmp_path, LATENTS, LABELS) / "latents_rank00_shard001.safetensors"
    edit(path, **tensors)
    with pytest.raises(ValueError, match=rf"shard001\.safetensors(: |, | ){message}"):
        open_latents(tmp_path)


def test_other_tensors_are_left_out(tmp_path):
    path = shards_of(tmp_path, LATENTS[:4], LABELS[:4]) / "latents_rank00_shard000.safetensors"
    edit(path, prompts=torch.zeros(2))
    assert open_latents(tmp_path).notes[1] == "left out: prompts"


def test_a_shard_that_is_damaged(tmp_path):
    path = shards_of(tmp_path, LATENTS, LABELS) / "latents_rank00_shard001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard001\.safetensors cannot be read as safetensors") as error:
            open_latents(tmp_path)
        assert "\n" not in str(error.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"shard001\.safetensors is not a regular file"):
        open_latents(tmp_path)


def test_a_shard_that_is_cut_after_it_was_opened(tmp_path):
    """Reading what is gone would end the process."""
    path = shards_of(tmp_path, LATENTS, LABELS) / "latents_rank00_shard001.safetensors"
    latents = open_latents(tmp_path)
    latents.read(5)
    os.truncate(path, 500)
    with pytest.raises(ValueError, match=r"shard001\.safetensors cannot be read as safetensors"):
        latents.read(5)


class Harm:
    def __reduce__(self):
        return print, ("harm",)


ONES = torch.ones(1, 32, 1, 1)


@pytest.mark.parametrize(
    "statistics",
    [
        Harm(),
        {"mean": Harm(), "std": ONES},
        {"mean": ONES},
        {"mean": ONES, "std": ONES[:, :4]},
        {"mean": ONES, "std": ONES.expand(10**6, 32, 10**3, 10**3)},
        {"mean": ONES, "std": torch.ones(32).to_sparse()},
        {"mean": ONES, "std": torch.ones(32, device="meta")},
        {"mean": ONES, "std": ONES.long()},
        {"mean": ONES, "std": ONES + 1j},
        {"mean": ONES * float("nan"), "std": ONES},
        {"mean": ONES, "std": [1.0] * 32},
        {"mean": torch.ones(10**6), "std": ONES},
        [ONES, ONES],
        collections.OrderedDict(),
        None,
    ],
    ids=range(15),
)
def test_statistics_that_do_not_fit(tmp_path, statistics, capsys):
    torch.save(statistics, tmp_path / "latents_stats.pt")
    message = r"latents_stats\.pt cannot be read as the `mean` and `std` of 32 channels .*: give --latent-scale and --l"
    with pytest.raises(ValueError, match=message) as error:
        read_statistics(tmp_path / "latents_stats.pt", 32)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_statistics_with_a_deviation_of_zero(tmp_path):
    torch.save({"mean": ONES, "std": 0 * ONES}, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match=r"latents_stats\.pt: a deviation is 0"):
        read_statistics(tmp_path / "latents_stats.pt", 32)


def test_statistics_that_are_damaged(tmp_path):
    path = tmp_path / "latents_stats.pt"
    torch.save({"mean": ONES, "std": ONES}, path)
    whole = path.read_bytes()
    assert read_statistics(path, 32).scale == [1.0] * 32
    for content in (b"", whole[:-30], whole[:200], pickle.dumps({"mean": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"latents_stats\.pt cannot be read as"):
            read_statistics(path, 32)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(ValueError, match=r"it has 100,000,000 bytes"):
        read_statistics(path, 32)


def test_files_of_something_else(tmp_path):
    save_file(
        {"weight": torch.zeros(3, 4), "bias": torch.zeros(4), "x": ONES, "y": ONES + 1}, tmp_path / "model.safetensors"
    )
    assert latent_shards(tmp_path) == latent_shards(tmp_path / "model.safetensors") == []
    assert latent_shards(tmp_path / "gone") == []
    said = describe_safetensors(tmp_path / "model.safetensors")
    assert said == "bias F32 [4], weight F32 [3, 4], x F32 [1, 32, 1, 1], ..."
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "a.txt")
    assert latent_shards(tmp_path / "a.txt") == []
