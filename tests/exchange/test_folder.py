"""Folders for diffusers: what is in them, and that they draw what fastmask draws, where fastmask is not installed."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from util import files_of_at_most, small_net
from vaes import small_vae

from fastmask import EDM, VP, Denoiser, RectifiedFlow, load_maskdit
from fastmask.diffusion import LatentSpace, Origin, sample
from fastmask.exchange.folder import push, save_published, write_folder
from fastmask.generation.decoding import Decoder
from fastmask.models.deferred import DeferredConfig
from fastmask.models.sprint import SprintConfig

NETS = {
    "edm": (EDM(sigma_data=0.7), {}),
    "flow": (RectifiedFlow(shift=2.0), {"decoder_depth": 0, "decoder_width": 512, "qk_norm": True}),
    "vp": (VP(), {"decoder_depth": 0, "decoder_width": 512, "frequency_shift": 1, "patch_size": 4}),
    "unconditional": (EDM(), {"num_classes": 0, "qk_norm": True}),
    "options": (EDM(), {"norm": "rms", "mlp": "swiglu", "rope": True, "decoder_num_heads": 1}),
}
LABELS = [0, 4, 2]
# What a user runs, on a machine without fastmask: the folders and the noise are given, and the samples are stored.
PROGRAM = """
import sys
sys.modules["fastmask"] = None
import torch
from diffusers import DiffusionPipeline
content = torch.load(sys.argv[1])
drawn = {}
for name, (folder, options) in content.items():
    if not options.pop("alone"):
        options["custom_pipeline"] = folder
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **{
        key: options.pop(key) for key in list(options) if key == "custom_pipeline"
    })
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=5, **options).images
    drawn[name] = images if isinstance(images, torch.Tensor) else [image.size for image in images]
torch.save(drawn, sys.argv[2])
"""


def net_of(name):
    process, sizes = NETS[name]
    return Denoiser(small_net(**sizes).model, process).eval()


def draw_elsewhere(tmp_path, content):
    """Return what pipelines draw in a process that cannot import fastmask."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    torch.save(content, tmp_path / "asked.pt")
    files = [str(tmp_path / name) for name in ("asked.pt", "drawn.pt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", PROGRAM, *files]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(files[1])


def test_a_folder_draws_what_fastmask_draws(tmp_path):
    noise, asked, exact = torch.randn(3, 3, 8, 8), {}, {}
    for name in NETS:
        net = net_of(name)
        write_folder(net, tmp_path / name)
        classes = net.model.num_classes
        labels = torch.tensor(LABELS if classes else [0, 0, 0])
        for scale in (1.0, 2.5) if classes else (1.0,):
            options = {"alone": scale == 1, "latents": noise, "output_type": "latent", "guidance_scale": scale}
            options |= {"class_labels": LABELS} if classes else {"num_images": 3}
            asked[name, scale] = str(tmp_path / name), options
            exact[name, scale] = sample(net, noise, labels, net.process.times(5), cfg_scale=scale)
    for case, drawn in draw_elsewhere(tmp_path, asked).items():
        assert exact[case].std() > 0.1
        # Samples of random networks are large: a part of their size.
        assert (drawn - exact[case]).abs().max() < 1e-4 * max(1.0, float(exact[case].abs().max())), case


def test_a_folder_with_its_vae_draws_images(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers")
    small_vae().save_pretrained(tmp_path / "given")
    origin = Origin(
        latents=LatentSpace(vae="a/b", scale=0.5, shift=0.1), class_names=("ant", "bee", "cat", "dog", "eel")
    )
    net = Denoiser(small_net(in_channels=4).model, EDM())
    net.origin = origin
    write_folder(net, tmp_path / "out", vae=str(tmp_path / "given"))
    assert (tmp_path / "out" / "vae" / "config.json").exists()
    noise = torch.randn(2, 4, 8, 8)
    options = {"alone": True, "latents": noise, "class_labels": ["dog", 1]}
    asked = {
        "pt": (str(tmp_path / "out"), {**options, "output_type": "pt"}),
        "pil": (str(tmp_path / "out"), {"alone": True, "class_labels": "bee"}),
    }
    drawn = draw_elsewhere(tmp_path, asked)
    samples = sample(net, noise, torch.tensor([3, 1]), net.process.times(5), cfg_scale=1.5)
    images = Decoder(net, "it", str(tmp_path / "given"))(samples)
    torch.testing.assert_close(drawn["pt"], images / 2 + 0.5, rtol=0, atol=1e-4)
    assert drawn["pil"] == [tuple(images.shape[2:])]


def test_a_folder_is_a_source_of_weights(tmp_path):
    """Bit for bit: ours, the folder, ours."""
    for name in NETS:
        net = net_of(name)
        net.origin = Origin(class_names=("a", "b", "c", "d", "e")[: net.model.num_classes])
        write_folder(net, tmp_path / name)
        loaded = load_maskdit(tmp_path / name)
        assert (loaded.process, loaded.model.config, loaded.origin) == (net.process, net.model.config, net.origin)
        weights = loaded.state_dict()
        assert weights.keys() == net.state_dict().keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in net.state_dict().items())


def test_what_is_in_a_folder(tmp_path):
    net = net_of("edm")
    net.origin = Origin(class_names=("ant", "bee", "cat", "dog", "eel"))
    write_folder(net, tmp_path / "out", licence="mit", facts={"config": {"lr": 0.1}})
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    code = {"pipeline.py", "transformer/network.py"}
    assert found == {"README.md", "model_index.json", "transformer/config.json", weights, *code}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "ant", "1": "bee", "2": "cat", "3": "dog", "4": "eel"}
    assert index["process"] == {"name": "edm", "sigma_data": 0.7, "p_mean": -1.2, "p_std": 1.2}
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    # The weights have the published names, without a prefix.
    stored = load_file(tmp_path / "out" / weights)
    assert all(torch.equal(stored[name.removeprefix("model.")], tensor) for name, tensor in net.state_dict().items())
    for name in code:
        text = (tmp_path / "out" / name).read_text()
        assert "Apache License" in text
        assert "import fastmask" not in text
        assert "from fastmask" not in text
        assert len(text.splitlines()) < 300


@pytest.mark.parametrize(
    ("origin", "channels", "given", "latents", "name"),
    [
        (None, 3, "", None, None),
        (None, 4, "", {}, None),
        (None, 4, "owner/vae", {}, "owner/vae"),
        (Origin(), 4, "", None, None),
        (Origin(latents=LatentSpace(vae="owner/vae", scale=2.0)), 4, "", {"scale": 2.0, "shift": 0.0}, "owner/vae"),
        (Origin(latents=LatentSpace(vae="owner/vae")), 4, "other", {"scale": 1.0, "shift": 0.0}, "other"),
        (Origin(latents=LatentSpace(vae="/mine/vae")), 4, "", {"scale": 1.0, "shift": 0.0}, None),
    ],
)
def test_the_vae_is_recorded(tmp_path, origin, channels, given, latents, name, capsys):
    net = small_net(in_channels=channels)
    net.origin = origin
    write_folder(net, tmp_path / "out", vae=given)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["latents"], index["vae_name"], index["vae"]) == (latents, name, [None, None])
    own = origin is not None and origin.latents is not None and origin.latents.vae.startswith("/")
    assert ("which others lack: --vae /mine/vae copies it" in " ".join(capsys.readouterr().out.split())) == own


def test_what_a_folder_cannot_be(tmp_path):
    net = small_net(in_channels=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    for out in ("full", "file"):
        with pytest.raises(ValueError, match=f"--out {tmp_path / out} exists already: name another folder, or delete"):
            write_folder(net, tmp_path / out)
    for vae, message in [
        ("./absent", r"--vae \./absent: there is no such folder"),
        (str(tmp_path / "full"), r"full holds no VAE of diffusers: a config\.json and diffusion_pytorch_model"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_folder(net, tmp_path / "out", vae=vae)
    pixels = small_net()
    pixels.origin = Origin()
    with pytest.raises(ValueError, match="--vae: the network was trained on pixels, which need no VAE"):
        write_folder(pixels, tmp_path / "out", vae="a/b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_what_a_folder_cannot_express(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cosine(EDM):
        name = "cosine"

    class Sprint(type(small_net().model.config)):
        name = "sprint"

    with pytest.raises(ValueError, match="has the processes edm, flow and vp, and this one is cosine"):
        write_folder(Denoiser(small_net().model, Cosine()), tmp_path / "out")
    net = small_net()
    net.model.config = Sprint()
    with pytest.raises(ValueError, match="has the network maskdit alone, and this one is sprint"):
        write_folder(net, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    with files_of_at_most(2000), pytest.raises(OSError):  # noqa: PT011  (whatever the system says)
        write_folder(small_net(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_upload_is_left_to_the_hub(tmp_path, monkeypatch):
    calls = []

    def upload_folder(**options):
        calls.append(options)
        return "https://hub/me/it"

    hub = types.SimpleNamespace(create_repo=lambda name, exist_ok: calls.append(name), upload_folder=upload_folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    write_folder(small_net(), tmp_path / "out")
    assert calls == []
    assert push(tmp_path / "out", "me/it") == "https://hub/me/it"
    assert calls == ["me/it", {"repo_id": "me/it", "folder_path": str(tmp_path / "out")}]

    def refuse(**options):
        raise OSError("401 Unauthorized\nmore of it")

    hub.upload_folder = refuse
    with pytest.raises(
        ValueError, match=r"--push-to-hub me/it: \S+out is written, and was not uploaded: 401 Unauth"
    ) as e:
        push(tmp_path / "out", "me/it")
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="--push-to-hub needs huggingface_hub: pip install huggingface_hub"):
        push(tmp_path / "out", "me/it")


def test_a_pt_file_is_edm(tmp_path):
    save_published(tmp_path / "a.pt", net_of("edm"))
    weights = torch.load(tmp_path / "a.pt")
    assert all(torch.equal(weights[name], tensor) for name, tensor in net_of("edm").state_dict().items())
    with pytest.raises(ValueError, match=r"states no process and is read as EDM's, and these weights are of VP\(\)"):
        save_published(tmp_path / "b.pt", net_of("vp"))


@pytest.mark.parametrize("config", [SprintConfig(), DeferredConfig()], ids=lambda config: config.name)
def test_a_pt_file_is_of_maskdit(tmp_path, config):
    with pytest.raises(ValueError, match=f"read as MaskDiT's, and these weights are of {config.name}: write .safetens"):
        save_published(tmp_path / "a.pt", Denoiser(config.build(1, 8, 10), EDM()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"), [("frequency_shift", 1), ("norm", "rms"), ("mlp", "swiglu"), ("rope", True)]
)
def test_a_pt_file_has_the_published_blocks(tmp_path, field, value):
    """It states no network, and what its tensors do not tell would be lost."""
    net = small_net(decoder_num_heads=1, **{field: value})
    with pytest.raises(ValueError, match=f"states no network .* these weights are of {field} {value}: write .safetens"):
        save_published(tmp_path / "a.pt", net)
    assert not list(tmp_path.iterdir())
