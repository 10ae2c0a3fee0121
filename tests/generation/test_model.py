"""The Python API."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from util import small_net

import fastmask
from fastmask.diffusion import Denoiser, Origin, RectifiedFlow, Sampling, draw_samples
from fastmask.diffusion.weights import save_weights
from fastmask.generation.model import Batches, Model
from fastmask.grid import to_uint8
from fastmask.testing import assert_near, network_steps
from fastmask.training.checkpoint import Checkpointer

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def model():
    net = small_net(depth=1)
    net.origin = Origin(class_names=("ant", "bee", "cat", "dog", "eel"))
    return Model(net, "runs/a")


def exact(model, labels, **settings):
    return to_uint8(draw_samples(model.net, torch.tensor(labels), Sampling(**settings), seed=3))


def test_images_of_classes(model):
    images = model.sample(classes=["bee", 4, "bee"], seed=3, sample_steps=3, cfg_scale=2.0)
    assert (images.dtype, images.shape) == (torch.uint8, (3, 8, 8, 3))
    assert torch.equal(images, exact(model, [1, 4, 1], sample_steps=3, cfg_scale=2.0))
    assert torch.equal(
        model.sample(["bee"], num_samples=3, seed=3, sample_steps=3), exact(model, [1] * 3, sample_steps=3)
    )
    assert torch.equal(
        model.sample(num_samples=2, seed=3, sample_steps=3), exact(model, [5, 5], sample_steps=3, cfg_scale=1)
    )
    assert model.sample(sample_steps=2).shape == (1, 8, 8, 3)


def test_batches_are_of_one_size(model):
    sizes, draw = [], model.draw
    model.draw = lambda ids, first, count, *args, **kwargs: (
        sizes.append((first, count)) or draw(ids, first, count, *args, **kwargs)
    )
    images = model.sample([0, 1, 2], num_samples=5, batch_size=4, seed=3, sample_steps=2)
    assert sizes == [(0, 3), (3, 3)]
    assert torch.equal(images[:3], exact(model, [0, 1, 2], sample_steps=2))
    assert (Batches.of(50_000, 256).count, Batches.of(50_000, 256).size) == (196, 256)
    assert [Batches.of(5, 3).kept(batch) for batch in range(2)] == [3, 2]
    assert Batches.of(2, 256) == Batches(2, 2)


def test_another_model_guides(model):
    weak = Model(small_net(depth=1, seed=1), "weak")
    images = model.sample([0, 1], guide=weak, seed=3, sample_steps=2, cfg_scale=2.0)
    net = draw_samples(model.net, torch.tensor([0, 1]), Sampling(sample_steps=2, cfg_scale=2), seed=3, guide=weak.net)
    assert torch.equal(images, to_uint8(net))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["be"]}, "--classes be: runs/a knows no such class: did you mean bee"),
        ({"classes": [5]}, r"--classes 5: the classes are 0 \.\. 4"),
        ({"classes": []}, "num_samples and batch_size must be at least 1, and classes must name one"),
        ({"num_samples": 0}, "num_samples and batch_size must be at least 1"),
        ({"batch_size": 0}, "num_samples and batch_size must be at least 1"),
        ({"steps": 3}, "steps is no setting of sampling: see fastmask.diffusion.Sampling"),
        ({"sample_steps": 1}, "--sample-steps must be at least 2, not 1"),
        ({"cfg_scale": 2.0}, "guidance goes by labels, and these samples have none"),
    ],
    ids=str,
)
def test_mistakes(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**arguments)


@pytest.mark.parametrize("process", [None, RectifiedFlow()], ids=["edm", "flow"])
def test_denoising_at_a_noise_level(process):
    """Noised images are image + sigma * noise, whatever the process scales them by."""
    net = small_net()
    net = Denoiser(net.model, process) if process else net
    x, sigma, labels = torch.randn(3, 3, 8, 8), torch.tensor([0.5, 1.0, 3.0]), torch.tensor([0, 5, 2])
    found = Model(net, "a").denoise(x, sigma, labels)
    assert found.dtype == torch.float32
    t, scale = (sigma / (1 + sigma), 1 / (1 + sigma)) if process else (sigma, torch.ones(3))
    assert_near(found, net(scale[:, None, None, None] * x, t, labels).detach(), network_steps(4), dtype=torch.float32)
    one = Model(net, "a").denoise(x, 0.5)
    expected = net(scale[0] * x, t[:1].expand(3), torch.full((3,), 5)).detach()
    assert_near(one, expected, network_steps(4), dtype=torch.float32)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="sigma must be above 0 and finite"):
            Model(net, "a").denoise(x, bad)


def test_precision(model, monkeypatch):
    seen = []
    model.net.model.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    plain = model.sample([0], sample_steps=2)
    low = Model(model.net, "a", precision="bf16").sample([0], sample_steps=2)
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert (low != plain).any()
    assert (low.int() - plain.int()).abs().float().mean() < 5
    for emulated in (True, False):  # a GPU that emulates bf16 is asked for fp32
        FakeCuda().install(monkeypatch)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, e=emulated: not e)
        monkeypatch.setattr(
            Model, "device", property(lambda self: torch.device("cuda"), lambda self, place: None), raising=False
        )
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        assert Model(model.net, "a")._autocast == (not emulated)
        assert not Model(model.net, "a", precision="fp32")._autocast
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
        with contextlib.nullcontext() if not emulated else pytest.raises(ValueError, match="Tesla T4 has no bf16"):
            Model(model.net, "a", precision="bf16")


def test_blocks_are_compiled_where_asked(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    Model(model.net, "a")
    Model(model.net, "a", compile="none")
    assert not compiled
    Model(model.net, "a", compile="block")
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 3  # one block of the encoder, two of the decoder


def test_a_run_is_loaded(tmp_path):
    net, ema = small_net(depth=1), small_net(depth=1, seed=1)
    with Checkpointer(tmp_path / "run", 1) as checkpointer:
        optimizer = torch.optim.AdamW(net.parameters())
        checkpointer.save(1, net, dict(ema.named_parameters()), optimizer, {"ema_warmup": True})
    for weights, expected in (("ema", ema), ("raw", net)):
        model = fastmask.load(tmp_path / "run", device="cpu", weights=weights)
        assert model.class_names == []
        assert torch.equal(model.sample([1], sample_steps=2), Model(expected, "a").sample([1], sample_steps=2))
    save_weights(tmp_path / "a.safetensors", net)
    assert fastmask.load(tmp_path / "a.safetensors").digest() == Model(net, "a").digest() != Model(ema, "a").digest()
    with pytest.raises(ValueError, match="absent does not exist"):
        fastmask.load(tmp_path / "absent")


def test_the_readme(tmp_path, monkeypatch):
    (section,) = re.findall(r"## Sample from Python\n.*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(section.splitlines()) <= 12
    net = small_net(depth=1, in_channels=1, num_classes=10)
    with Checkpointer(tmp_path / "runs" / "digits", 1) as checkpointer:
        checkpointer.save(1, net, {}, torch.optim.AdamW(net.parameters()), {"ema_warmup": True})
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(section, "README.md", "exec"), scope)
    assert torch.equal(scope["images"], Model(net, "a").sample([3, 7, 7], seed=0, cfg_scale=2.0, sample_steps=18))
    assert scope["denoised"].shape == (3, 1, 8, 8)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_importing_the_package_imports_no_more_than_the_network_needs():
    """Neither safetensors nor rich, nor what draws: `fastmask.load` brings them."""
    code = (
        "import sys, fastmask; print([m for m in ('safetensors', 'rich', 'PIL', 'fastmask.data', 'fastmask.generation')"
    )
    code += " if m in sys.modules]); print(fastmask.load.__module__, fastmask.to_pil.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "fastmask.generation.model fastmask.grid"]
