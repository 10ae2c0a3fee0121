"""Latents in the layouts of other projects, for tests."""

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

EDM2_MEAN = np.float32([5.81, 3.25, 0.12, -2.15])
EDM2_STD = np.float32([4.17, 4.62, 3.71, 3.28])


def moments_of(count, channels=8, side=4):
    return np.random.default_rng(0).standard_normal((count, channels, side, side)).astype(np.float32)


def everything(latents):
    """Return all records of latents, and their labels."""
    records, labels = zip(*(latents.read(i) for i in range(len(latents))), strict=True)
    return np.stack(records), list(labels)


def lmdb_of(path, moments, labels, **others):
    """Write MaskDiT's LMDB; keys of other content are given with "_" for "-"."""
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    with lmdb.open(str(path), map_size=2**24) as base, base.begin(write=True) as transaction:
        for i, (moment, label) in enumerate(zip(moments, labels, strict=True)):
            transaction.put(f"z-{i}".encode(), moment.tobytes())
            transaction.put(f"y-{i}".encode(), str(label).encode())
        transaction.put(b"length", str(len(labels)).encode())
        for key, value in others.items():
            transaction.put(key.replace("_", "-").encode(), value)
    return path


def tar_of(path, samples):
    """Write a tar of files by their names."""
    with tarfile.open(path, "w") as file:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def latent_tar_of(path, moments, labels, protocol=4):
    """Write MaskDiT's tar of pickled arrays."""
    samples = {f"{i:07}.latent": pickle.dumps(moment, protocol) for i, moment in enumerate(moments)}
    samples |= {f"{i:07}.cls": str(label).encode() for i, label in enumerate(labels)}
    return tar_of(path, dict(sorted(samples.items())))


def features_of(path, values, labels):
    """Write fast-DiT's folders below a path."""
    folders = path / "imagenet256_features", path / "imagenet256_labels"
    for folder in folders:
        folder.mkdir(parents=True)
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        np.save(folders[0] / f"{i}.npy", value[None])
        np.save(folders[1] / f"{i}.npy", np.array([label]))
    return folders


def raw_moments(count, mean, std=1.0, channels=4, side=4):
    """Return means, of this mean and deviation per channel, and small deviations, (count, 2C, side, side)."""
    random = np.random.default_rng(1).standard_normal((count, channels, side, side)).astype(np.float32)
    means = random * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    return np.concatenate([means, np.full_like(means, 0.01)], 1).astype(np.float32)


def edm2_of(path, values, labels=None, packed=False):
    """Write EDM2's layout, as a folder or as a zip, and return its path."""
    labels = range(len(values)) if labels is None else labels
    names = [f"{i // 1000:05}/img-mean-std-{i:08}.npy" for i in range(len(values))]
    for name, value in zip(names, values, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(path / name, value)
    listed = [[name, label] for name, label in zip(names, labels, strict=True)]
    (path / "dataset.json").write_text(json.dumps({"labels": listed}))
    return zipped(path) if packed else path


def zipped(path):
    """Return a zip of a folder, beside it."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as file:
        for member in sorted(path.rglob("*.*")):
            file.write(member, member.relative_to(path))
    return path.with_suffix(".zip")


def shards_of(path, latents, labels, flipped=True, statistics=True, per_shard=4, dtype=torch.float32):
    """Write LightningDiT's shards of latents (N, C, h, w), and their statistics."""
    path.mkdir(parents=True, exist_ok=True)
    latents, labels = torch.from_numpy(latents), torch.tensor(labels)
    for number, first in enumerate(range(0, len(latents), per_shard)):
        some = latents[first : first + per_shard].to(dtype).contiguous()
        tensors = {"latents": some, "labels": labels[first : first + per_shard].contiguous()}
        if flipped:
            tensors["latents_flip"] = some.flip(3).contiguous() + 1
        save_file(tensors, path / f"latents_rank00_shard{number:03}.safetensors", {"total_size": str(len(some))})
    if statistics:
        mean, std = (value.view(1, -1, 1, 1) for value in (latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
        torch.save({"mean": mean, "std": std}, path / "latents_stats.pt")
    return path
