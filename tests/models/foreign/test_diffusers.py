import json

import pytest
import torch
from safetensors.torch import save_file

from fastmask import VP, load_maskdit
from fastmask.kernels import unpatchify
from fastmask.models.foreign.diffusers import from_diffusers
from fastmask.models.layers import time_frequencies

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_eps": 1e-6,
}


def transformer(out_channels=6, **sizes):
    """A random DiTTransformer2DModel; its blocks share the embedders' weights, as those of converted DiTs do."""
    model = diffusers.DiTTransformer2DModel(**{**SIZES, **sizes}, out_channels=out_channels).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5, generator=generator)
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture(scope="module")
def model():
    return transformer()


def parts(model):
    return dict(model.state_dict()), json.loads(model.to_json_string())


@pytest.mark.parametrize("form", ["folder", "pipeline", "bin"])
@pytest.mark.parametrize("out_channels", [3, 6])
def test_the_noise_is_that_of_diffusers(tmp_path, out_channels, form, capsys):
    model = transformer(out_channels)
    folder = tmp_path / "transformer" if form == "pipeline" else tmp_path
    model.save_pretrained(folder, safe_serialization=form != "bin")
    net = load_maskdit(tmp_path).eval()
    assert net.process == VP()
    assert (net.model.num_heads, net.model.num_classes, net.model.config.frequency_shift) == (2, 5, 1)
    assert ("channels of learned variance" in capsys.readouterr().out) == (out_channels == 6)
    x, labels, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 4, 5, 2]), torch.tensor([0, 17, 500, 999])
    with torch.no_grad():
        exact = model(x, timestep=t, class_labels=labels).sample[:, :3]
    raw = unpatchify(net.model(x, t.float(), labels), 2, 8, 8)
    torch.testing.assert_close(raw, exact, rtol=0, atol=1e-4)
    assert exact.std() > 0.1


def test_its_frequencies_are_not_those_of_dit():
    ratio = time_frequencies(0) / time_frequencies(1)
    assert ratio[0] == 1
    assert ratio[-1] > 1.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "it is a PixArtTransformer2DModel, and of diffusers' networks DiT",
        ),
        ({"norm_type": "ada_norm"}, "its norm_type is 'ada_norm', and 'ada_norm_zero' is what is read"),
        ({"activation_fn": "geglu"}, "its activation_fn is 'geglu'"),
        ({"attention_bias": False}, "its attention_bias is False"),
        ({"norm_eps": 1e-3}, "its norm_eps is 0.001, and at most 1e-05 is read"),
        ({"num_attention_heads": "2"}, "lacks a usable num_attention_heads"),
        ({"sample_size": 10**9}, "its sample_size is 1000000000, and its patch_size 2"),
        ({"sample_size": 9}, "its sample_size is 9, and its patch_size 2"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(model, change, message):
    weights, config = parts(model)
    with pytest.raises(ValueError, match=message):
        from_diffusers(weights, {**config, **change})


def test_weights_that_are_not_read(model):
    weights, config = parts(model)
    emb = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match=f"{emb} differs from the copy in the first block"):
        from_diffusers({**weights, emb: weights[emb] + 1e-3}, config)
    lacking = {name: tensor for name, tensor in weights.items() if "blocks.1.attn1.to_k.bias" not in name}
    with pytest.raises(ValueError, match=r"transformer_blocks\.1 lacks a bias of attn1\.to_q, to_k or to_v"):
        from_diffusers(lacking, config)
    lacking = {name: tensor for name, tensor in weights.items() if name != "proj_out_2.bias"}
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias is missing"):
        from_diffusers(lacking, config)


def test_tensors_of_other_shapes_are_refused(tmp_path, model):
    """Whichever it is."""
    weights, config = parts(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in weights:
        for tensor in (None, torch.tensor(1.0), torch.ones(3), torch.ones(2, 3, 1)):
            changed = {key: value for key, value in weights.items() if key != name}
            changed |= {} if tensor is None else {name: tensor}
            save_file(changed, tmp_path / "diffusion_pytorch_model.safetensors")
            with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors") as error:
                load_maskdit(tmp_path)
            assert "\n" not in str(error.value)


def test_another_schedule_of_the_pipeline_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path / "transformer")
    diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02).save_pretrained(tmp_path / "scheduler")
    load_maskdit(tmp_path)
    diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"beta_end of \S+ is 0\.03, and 0\.02 is what is read"):
        load_maskdit(tmp_path)


def test_weights_without_their_configuration(tmp_path, model):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the config\.json that belongs beside them is missing"):
        load_maskdit(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no mapping"):
        load_maskdit(tmp_path)
