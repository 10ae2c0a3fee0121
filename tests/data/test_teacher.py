"""Teachers: what they see, and what they are refused for."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teachers import Small
from torch import nn

from fastmask.data.fingerprint import of_weights
from fastmask.data.teacher import Teacher

CPU = torch.device("cpu")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8))).float() / 127.5 - 1
has_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
has_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is missing")


def test_a_network_of_ones_own_sees_resized_and_normalised_images():
    teacher, net = Teacher("teachers:small", 4, CPU), Small()
    assert (teacher.name, teacher.grid, teacher.width, teacher.side) == ("teachers:small", 4, 24, 12)
    assert teacher.sha256 == of_weights(net)
    assert teacher.precision == "float32 on cpu"
    pixels = F.interpolate((IMAGES + 1) / 2, size=(12, 12), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(of)[:, None, None] for of in (net.mean, net.std))
    expected = net((pixels - mean) / std)[:, 1:]
    features = teacher(IMAGES)
    assert features.shape == (2, 16, 24)
    assert not features.requires_grad
    torch.testing.assert_close(features, expected)
    given = teacher.targets(IMAGES, None, 0, torch.arange(2))
    assert torch.equal(given, features)
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_images_of_the_right_side_are_not_resized():
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    net = Small()
    mean, std = (torch.tensor(of)[:, None, None] for of in (net.mean, net.std))
    torch.testing.assert_close(Teacher("teachers:small", 4, CPU)(images), net(((images + 1) / 2 - mean) / std)[:, 1:])


def test_grey_images_are_repeated():
    teacher = Teacher("teachers:small", 4, CPU)
    assert torch.equal(teacher(IMAGES[:, :1]), teacher(IMAGES[:, :1].repeat(1, 3, 1, 1)))


def test_macs_are_those_of_its_operators():
    teacher = Teacher("teachers:small", 4, CPU)
    assert teacher.macs() == 16 * 27 * 24 + 17 * 24 * 24


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2", "--align-teacher dinov2 names no teacher: give timm:NAME, such as timm:vit_base_patch14_dinov2"),
        (":small", "names no teacher"),
        ("teachers:", "names no teacher"),
        ("teachers:large", "teacher teachers:large cannot be used: module 'teachers' has no attribute 'large'"),
        ("no_such_module:net", "teacher no_such_module:net cannot be used: No module named 'no_such_module'"),
        (
            "teachers:blind",
            r"teacher teachers:blind cannot be used: it returns \(1, 5, 24\) for a grid of 4 x 4 patches",
        ),
        ("teachers:broken", "teacher teachers:broken cannot be used: its features of a grey image are not finite"),
        ("torch.nn:Identity", "'Identity' object has no attribute 'patch_size'"),
    ],
)
def test_names_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        Teacher(name, 4, CPU)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(importlib.import_module("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"cannot be used: it needs {package}: pip install {package}"):
        Teacher(f"{package}:something", 4, CPU)


@has_timm
def test_timm_from_a_folder(tmp_path):
    import timm  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    settings = {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **settings).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": "vit_small_patch14_reg4_dinov2", "num_classes": 0}
    about |= {"model_args": settings, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    teacher = Teacher(f"timm:local-dir:{tmp_path}", 4, CPU)
    assert (teacher.width, teacher.side, teacher.sha256) == (32, 56, of_weights(net))
    pixels = F.interpolate((IMAGES + 1) / 2, size=(56, 56), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(of)[:, None, None] for of in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    with torch.no_grad():
        expected = net.forward_features((pixels - mean) / std)[:, 5:]  # a class token and four registers
    torch.testing.assert_close(teacher(IMAGES), expected)
    # 21 tokens: qkv, projection and MLP, and attention; the patch embedding of 16.
    assert teacher.macs() == 16 * 3 * 14 * 14 * 32 + 2 * (21 * 12 * 32 * 32 + 2 * 21 * 21 * 32)
    assert Teacher(f"timm:local-dir:{tmp_path}", 3, CPU)(IMAGES).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="teacher timm:no_such_network cannot be used: "):
        Teacher("timm:no_such_network", 4, CPU)


@has_transformers
def test_transformers_from_a_folder(tmp_path):
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    net = transformers.Dinov2Model(config).eval()
    net.save_pretrained(tmp_path)
    transformers.BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    teacher = Teacher(f"transformers:{tmp_path}", 4, CPU)
    assert (teacher.width, teacher.side) == (32, 56)
    pixels = F.interpolate((IMAGES + 1) / 2, size=(56, 56), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(of)[:, None, None] for of in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    with torch.no_grad():
        expected = net(pixel_values=(pixels - mean) / std).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(IMAGES), expected)
    with pytest.raises(ValueError, match="cannot be used: "):
        Teacher(f"transformers:{tmp_path / 'missing'}", 4, CPU)


def test_weights_are_told_apart():
    """By their hash, which checkpoints and stores state."""
    other = Small()
    nn.init.zeros_(other.mixed.bias)
    assert of_weights(other) != Teacher("teachers:small", 4, CPU).identity
