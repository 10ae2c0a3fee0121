"""Reading and writing weights in the published names."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from util import golden, small_net

from fastmask import EDM, load_maskdit
from fastmask.described import to_json
from fastmask.diffusion.weights import save_weights, weights_for

HEADS = {"num_heads": 2, "decoder_num_heads": 3}  # those of small_net
CANNOT_BE = "the {} that its metadata state cannot be built: "


def bare(weights):
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def assert_same_network(net, expected):
    weights, others = net.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name
    side = expected.model.input_size
    x, sigma, labels = (
        torch.randn(2, 3, side, side),
        torch.tensor([0.3, 2.0]),
        torch.tensor([1, expected.model.num_classes]),
    )
    assert torch.equal(net(x, sigma, labels), expected(x, sigma, labels))


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "_orig_mod.model.", "module._orig_mod.model."])
def test_names_with_and_without_prefixes(prefix):
    net = small_net()
    weights = {prefix + name: tensor for name, tensor in bare(net.state_dict()).items()}
    assert_same_network(load_maskdit(weights, **HEADS), net)


@pytest.mark.parametrize(
    "sizes",
    [
        {"decoder_depth": 0},
        {"num_classes": 0},
        {"patch_size": 4, "depth": 1, "decoder_depth": 3},
        {"input_size": 6},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_sizes_are_read_from_the_shapes(sizes):
    net = small_net(**sizes)
    loaded = load_maskdit(net.state_dict(), **HEADS)
    assert_same_network(loaded, net)
    for name in ("input_size", "patch_size", "in_channels", "length", "num_classes", "num_heads", "qk_norm"):
        assert getattr(loaded.model, name) == getattr(net.model, name), name


def test_the_golden_network():
    loaded = load_maskdit(golden().weights, num_heads=4)
    assert loaded.state_dict().keys() == golden().weights.keys()
    assert loaded.model.decoder_num_heads == 16


def test_heads_of_a_published_width_are_known():
    sizes = {"input_size": 4, "depth": 1, "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 16}
    for width, heads in {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}.items():
        weights = small_net(width=width, num_heads=heads, **sizes).state_dict()
        assert load_maskdit(weights).model.num_heads == heads
        assert load_maskdit(weights, num_heads=2).model.num_heads == 2


def test_an_unknown_width_needs_heads():
    with pytest.raises(ValueError, match="no published size has width 16, so its heads are unknown: pass num_heads"):
        load_maskdit(small_net().state_dict())


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="width 16 does not divide into num_heads 3"):
        load_maskdit(small_net().state_dict(), num_heads=3, decoder_num_heads=3)
    with pytest.raises(ValueError, match="decoder_width 12 does not divide into decoder_num_heads 16"):
        load_maskdit(small_net().state_dict(), num_heads=2)


def test_heads_and_sigma_data_change_the_network():
    net = small_net(sigma_data=1.5)
    assert load_maskdit(net.state_dict(), **HEADS, sigma_data=1.5).process == EDM(sigma_data=1.5)
    assert load_maskdit(net.state_dict(), **HEADS).process == EDM()
    x, sigma, labels = torch.randn(1, 3, 8, 8), torch.tensor([1.0]), torch.tensor([0])
    loaded = load_maskdit(net.state_dict(), num_heads=4, decoder_num_heads=3, sigma_data=1.5)
    assert not torch.equal(loaded(x, sigma, labels), net(x, sigma, labels))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_a_pt_file(tmp_path, suffix, as_type):
    net = small_net()
    torch.save(net.state_dict(), tmp_path / f"weights{suffix}")
    assert_same_network(load_maskdit(as_type(tmp_path / f"weights{suffix}"), **HEADS), net)


def test_a_pt_file_in_the_old_format(tmp_path):
    net = small_net()
    torch.save(net.state_dict(), tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    assert_same_network(load_maskdit(tmp_path / "weights.pt", **HEADS), net)


def test_a_published_training_file(tmp_path):
    net, ema = small_net(), small_net(seed=1)
    content = {
        "model": net.state_dict(),
        "ema": ema.state_dict(),
        "opt": torch.optim.AdamW(net.parameters()).state_dict(),
        "args": argparse.Namespace(lr=1e-4, config="configs/train.yaml"),
    }
    torch.save(content, tmp_path / "0000100.pt")
    assert_same_network(load_maskdit(tmp_path / "0000100.pt", **HEADS), ema)
    del content["ema"]
    torch.save(content, tmp_path / "0000100.pt")
    assert_same_network(load_maskdit(tmp_path / "0000100.pt", **HEADS), net)


def test_a_safetensors_file_of_others(tmp_path):
    net = small_net()
    save_file(bare(net.state_dict()), tmp_path / "weights.safetensors")
    assert_same_network(load_maskdit(tmp_path / "weights.safetensors", **HEADS), net)
    with pytest.raises(ValueError, match=r"weights.safetensors: no published size has width 16"):
        load_maskdit(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("sizes", [{}, {"decoder_depth": 0}, {"num_classes": 0}], ids=str)
def test_saved_weights_state_their_heads(tmp_path, sizes):
    net = small_net(sigma_data=1.25, **sizes)
    save_weights(tmp_path / "weights.safetensors", net)
    # What the file states holds against the arguments, too.
    for loaded in (
        load_maskdit(tmp_path / "weights.safetensors"),
        load_maskdit(tmp_path / "weights.safetensors", num_heads=4, decoder_num_heads=2, sigma_data=0.5),
    ):
        assert loaded.process == EDM(sigma_data=1.25)
        assert (loaded.model.num_heads, loaded.model.decoder_num_heads) == (2, 3)
        assert_same_network(loaded, net)


def test_other_weights_of_the_same_names_can_be_saved(tmp_path):
    net, ema = small_net(), small_net(seed=1)
    save_weights(tmp_path / "ema.safetensors", net, ema.state_dict())
    assert_same_network(load_maskdit(tmp_path / "ema.safetensors"), ema)


def test_weights_become_fp32(tmp_path):
    net = small_net().to(torch.bfloat16)
    loaded = load_maskdit(net.state_dict(), **HEADS)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert_same_network(loaded, net.float())


def test_the_network_is_ready_to_train():
    source = small_net().requires_grad_(False).eval()
    loaded = load_maskdit(source.state_dict(), **HEADS)
    assert loaded.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())
    assert not any(buffer.requires_grad for buffer in loaded.buffers())


def test_parameters_as_a_source_stay_out_of_the_graph():
    source = small_net()
    loaded = load_maskdit({**dict(source.named_parameters()), **dict(source.named_buffers())}, **HEADS)
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in loaded.parameters())
    loaded(torch.randn(1, 3, 8, 8), torch.tensor([1.0]), torch.tensor([0])).sum().backward()
    assert loaded.model.final_layer.linear.bias.grad.any()
    assert all(parameter.grad is None for parameter in source.parameters())


def test_the_source_is_not_shared():
    source = small_net().state_dict()
    before = {name: tensor.clone() for name, tensor in source.items()}
    loaded = load_maskdit(source, **HEADS)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in source.values()}
    assert not addresses & {tensor.untyped_storage().data_ptr() for tensor in loaded.state_dict().values()}
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.add_(1)
    assert source.keys() == before.keys()
    assert all(torch.equal(source[name], tensor) for name, tensor in before.items())
    assert not any(tensor.requires_grad for tensor in source.values())


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "pos_embed"])
def test_without_what_tells_the_sizes(name):
    weights = bare(small_net().state_dict())
    del weights[name]
    with pytest.raises(ValueError, match="the given mapping is no MaskDiT: it lacks a usable "):
        load_maskdit(weights, **HEADS)


def test_nothing_at_all():
    with pytest.raises(ValueError, match="the given mapping is no MaskDiT"):
        load_maskdit({}, **HEADS)


def test_missing_names_are_listed():
    weights = bare(small_net().state_dict())
    for name in ("blocks.1.mlp.fc1.bias", "decoder_layer.linear.weight"):
        del weights[name]
    with pytest.raises(ValueError, match="the given mapping is of another network") as error:
        load_maskdit(weights, **HEADS)
    for name in ("blocks.1.mlp.fc1.bias is missing", "decoder_layer.linear.weight is missing"):
        assert f"model.{name}" in str(error.value)
    assert "more" not in str(error.value)


def test_a_network_without_a_mask_token_misses_it():
    weights = bare(small_net().state_dict())
    del weights["mask_token"]
    with pytest.raises(ValueError, match="is of another network"):
        load_maskdit(weights, num_heads=2, decoder_num_heads=16)


def test_names_of_another_network_are_listed():
    weights = {**small_net().state_dict(), "model.blocks.0.attn.rope.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"model\.blocks\.0\.attn\.rope\.weight is not part of the network"):
        load_maskdit(weights, **HEADS)


def test_wrong_shapes_are_listed():
    weights = bare(small_net().state_dict())
    weights["mask_token"] = weights["mask_token"][..., :8]
    weights["blocks.0.attn.qkv.bias"] = torch.zeros(47)
    weights["t_embedder.mlp.0.weight"] = torch.zeros(16, 128)
    with pytest.raises(ValueError, match="is of another network") as error:
        load_maskdit(weights, num_heads=2, decoder_num_heads=2)
    assert "model.blocks.0.attn.qkv.bias has shape (47,) instead of (48,)" in str(error.value)
    assert ", and " in str(error.value)  # the decoder's width was read from the mask token: all of its shapes differ
    weights = {**bare(small_net().state_dict()), "t_embedder.mlp.0.weight": torch.zeros(16, 128)}
    with pytest.raises(ValueError, match=r"t_embedder.mlp.0.weight has shape \(16, 128\) instead of \(16, 256\)"):
        load_maskdit(weights, **HEADS)


def test_a_position_table_of_no_square_grid():
    weights = {**small_net().state_dict(), "model.pos_embed": torch.zeros(1, 15, 16)}
    with pytest.raises(ValueError, match=r"model\.pos_embed has shape \(1, 15, 16\) instead of \(1, 9, 16\)"):
        load_maskdit(weights, **HEADS)


@pytest.mark.parametrize(
    "name", ["x_embedder.proj.weight", "pos_embed", "mask_token", "y_embedder.embedding_table.weight"]
)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_tensors_of_too_few_dimensions(name, shape):
    weights = {**bare(small_net().state_dict()), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match="the given mapping is"):
        load_maskdit(weights, num_heads=2, decoder_num_heads=1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_missing_file(tmp_path, suffix):
    with pytest.raises(ValueError, match=rf"absent\{suffix} does not exist, and {tmp_path} holds nothing: name a run"):
        load_maskdit(tmp_path / f"absent{suffix}")


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds nothing: name a run folder, one of its"):
        load_maskdit(tmp_path)


@pytest.mark.parametrize("name", ["weights.npz", "weights"])
def test_an_unknown_suffix(tmp_path, name):
    torch.save(small_net().state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: weights are read from \.safetensors, \.pt, \.pth, \.ckpt and"):
        load_maskdit(tmp_path / name, **HEADS)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"0", b"not weights", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_of_something_else(tmp_path, suffix, content):
    (tmp_path / f"weights{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\{suffix} cannot be read as weights: \S"):
        load_maskdit(tmp_path / f"weights{suffix}", **HEADS)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_a_truncated_file(tmp_path, form, share):
    net, path = small_net(), tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_weights(path, net)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"weights\{path.suffix} cannot be read as weights: \S"):
        load_maskdit(path, **HEADS)


def test_a_file_in_the_old_format_cut_off_anywhere(tmp_path):
    torch.save(small_net().state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    content, path = (tmp_path / "whole.pt").read_bytes(), tmp_path / "weights.pt"
    for size in range(0, 8000, 31):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"weights\.pt cannot be read as weights: \S"):
            load_maskdit(path, **HEADS)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3), {"ema": 4}])
def test_a_pt_file_of_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt holds no mapping of names to tensors"):
        load_maskdit(tmp_path / "weights.pt", **HEADS)


def test_the_average_of_a_training_file_or_its_raw_weights(tmp_path):
    net, ema = small_net(), small_net(seed=1)
    content = {"state_dict": net.state_dict(), "state_dict_ema": ema.state_dict(), "args": Path("train.yaml")}
    torch.save(content, tmp_path / "weights.pth.tar")
    for source in (content, tmp_path / "weights.pth.tar"):
        assert_same_network(load_maskdit(source, **HEADS), ema)
        assert_same_network(load_maskdit(source, **HEADS, weights="raw"), net)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in small_net().state_dict().items()}
    weights["model.blocks.1.mlp.fc2.bias"][2:4] = value
    match = r"2 of the 16 values of model\.blocks\.1\.mlp\.fc2\.bias are not finite"
    with pytest.raises(ValueError, match=f"the given mapping: {match}"):
        load_maskdit(weights, **HEADS)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"weights\.safetensors: {match}"):
        load_maskdit(tmp_path / "weights.safetensors", **HEADS)
    with pytest.raises(ValueError, match=rf"weights\.safetensors: {match}"):
        weights_for(small_net(), tmp_path / "weights.safetensors")


def test_values_beyond_fp32_are_not_finite_either():
    weights = {name: tensor.double() for name, tensor in small_net().state_dict().items()}
    weights["model.mask_token"][0, 0, 0] = 1e300
    with pytest.raises(ValueError, match=r"1 of the 12 values of model\.mask_token are not finite"):
        load_maskdit(weights, **HEADS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"name": "maskdit", "width": -5}',
            "states another network than its tensors are of: width -5, depth 4",
        ),
        ('{"name": "maskdit"}', "states another network than its tensors are of: width 96"),
        (
            '{"name": "maskdit", "norm": "batch"}',
            CANNOT_BE.format("network") + "'batch' is no norm of network maskdit",
        ),
        (
            '{"name": "unet"}',
            CANNOT_BE.format("network") + "the network 'unet' is unknown",
        ),
    ],
)
def test_a_network_that_cannot_be(tmp_path, text, message):
    stated = {"network": text, "process": to_json(EDM())}
    save_file(small_net().state_dict(), tmp_path / "weights.safetensors", stated)
    with pytest.raises(ValueError, match=message):
        load_maskdit(tmp_path / "weights.safetensors")


def test_a_process_is_stored(tmp_path):
    process = EDM(sigma_data=0.7, p_mean=-0.4, p_std=1.0)
    net = small_net()
    net.process = process
    save_weights(tmp_path / "weights.safetensors", net)
    assert load_maskdit(tmp_path / "weights.safetensors").process == process


@pytest.mark.parametrize("value", ["nan", "0", "-1", "inf", "-0.0", "0.5x", ""])
def test_a_sigma_data_that_cannot_be(tmp_path, value):
    stated = {"num_heads": "2", "decoder_num_heads": "3", "sigma_data": value}
    save_file(small_net().state_dict(), tmp_path / "weights.safetensors", stated)
    for load in (load_maskdit, lambda path: weights_for(small_net(), path)):
        with pytest.raises(ValueError, match=rf"weights\.safetensors: {CANNOT_BE.format('process')}"):
            load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_an_argument_sigma_data_that_cannot_be(value):
    with pytest.raises(ValueError, match="sigma_data must be a number above 0, not "):
        load_maskdit(small_net().state_dict(), **HEADS, sigma_data=value)


@pytest.mark.parametrize("name", ["num_heads", "decoder_num_heads"])
@pytest.mark.parametrize("value", ["0", "-2", "two", "2.0", "1e9", "99999999"])
def test_heads_that_cannot_be(tmp_path, name, value):
    save_file(small_net().state_dict(), tmp_path / "weights.safetensors", {name: value})
    with pytest.raises(ValueError, match=rf"weights\.safetensors states {name} '{value}', which is no number of heads"):
        load_maskdit(tmp_path / "weights.safetensors", **HEADS)


def taken(tmp_path, source, **sizes):
    """Return what of its tensors a network does not take from another's file, and what is said of that."""
    save_weights(tmp_path / "weights.safetensors", source)
    net = small_net(seed=1, **sizes)
    weights, notes = weights_for(net, tmp_path / "weights.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, source.state_dict()[name])
    return net.state_dict().keys() - weights.keys(), [note.removeprefix(str(tmp_path)) for note in notes]


LABELS = "model.y_embedder.embedding_table.weight"
POSITIONS = {"model.pos_embed", "model.decoder_pos_embed"}


def test_weights_for_other_classes_or_another_size(tmp_path):
    net, what = small_net(), "/weights.safetensors is for"
    assert taken(tmp_path, net) == (set(), [])
    for count in (1, 7):
        said = [f"{what} 5 classes: the label table for {count} is freshly initialized"]
        assert taken(tmp_path, net, num_classes=count) == ({LABELS}, said)
    assert taken(tmp_path, net, num_classes=0) == (set(), [f"{what} 5 classes: its label table is left out"])
    said = [f"{what} 0 classes: the label table for 5 is freshly initialized"]
    assert taken(tmp_path, small_net(num_classes=0)) == ({LABELS}, said)
    for size in (4, 16):
        said = [f"{what} images of 8 x 8: the position tables for {size} x {size} are recomputed"]
        assert taken(tmp_path, net, input_size=size) == (POSITIONS, said)
    left, said = taken(tmp_path, small_net().to(torch.bfloat16), input_size=16, num_classes=3)
    assert left == {LABELS, *POSITIONS}
    assert len(said) == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 24}, r"is of another network: .* has shape \(96, 16\) instead of \(144, 24\)"),
        ({"in_channels": 4}, r"model\.x_embedder\.proj\.weight has shape \(16, 3, 2, 2\) instead of \(16, 4, 2, 2\)"),
        ({"patch_size": 4}, r"is of another network: .*final_layer"),
        ({"depth": 3}, r"is of another network: .*blocks\.2\S+ is missing"),
        ({"decoder_depth": 0}, r"is of another network: .*is not part of the network"),
        ({"num_heads": 4}, "is of another network: its num_heads is 2 instead of 4"),
        ({"decoder_num_heads": 2}, "is of another network: its decoder_num_heads is 3 instead of 2"),
    ],
    ids=str,
)
def test_weights_of_another_network_are_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        taken(tmp_path, small_net(), **sizes, num_classes=7)


def test_position_tables_that_are_learned_are_interpolated(tmp_path):
    """Bicubic interpolation is exact for a table that is linear in row and column, away from the border."""
    net = small_net(input_size=16)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    net.model.pos_embed = torch.stack([rows + channel * columns for channel in range(16)], 2).view(1, 64, 16)
    assert taken(tmp_path, net, input_size=16) == (set(), [])
    weights, notes = weights_for(small_net(input_size=32), tmp_path / "weights.safetensors")
    table = weights["model.pos_embed"].view(16, 16, 16)
    at = (torch.arange(16.0) + 0.5) / 2 - 0.5
    exact = torch.stack([at[:, None] + channel * at for channel in range(16)], 2)
    torch.testing.assert_close(table[4:-4, 4:-4], exact[4:-4, 4:-4])
    assert "model.decoder_pos_embed" not in weights
    what = f"{tmp_path / 'weights.safetensors'} is for images of 16 x 16"
    assert notes == [
        f"{what}: the position tables for 32 x 32 are recomputed",
        f"{what}: pos_embed, which is no fixed table of sines, is interpolated to 32 x 32",
    ]


def test_other_frequencies_of_the_time_embedding_are_another_network(tmp_path):
    with pytest.raises(ValueError, match="is of another network: its frequency_shift is 1 instead of 0"):
        taken(tmp_path, small_net(frequency_shift=1))
    assert load_maskdit(tmp_path / "weights.safetensors").model.config.frequency_shift == 1


@pytest.mark.parametrize(
    ("option", "value", "usual"), [("norm", "rms", "layer"), ("mlp", "swiglu", "gelu"), ("rope", True, False)]
)
def test_blocks_with_other_options_are_another_network(tmp_path, option, value, usual):
    """No shape tells the norm or the rotation: the file states them, and one that states nothing has the usual ones."""
    sizes = {"decoder_num_heads": 1} if option == "rope" else {}
    net = small_net(**sizes, **{option: value})
    with pytest.raises(ValueError, match=f"is of another network: its {option} is {value} instead of {usual}"):
        taken(tmp_path, net)
    loaded = load_maskdit(tmp_path / "weights.safetensors")
    assert loaded.model.config == net.model.config
    assert_same_network(loaded, net)
    save_file(small_net(**sizes).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=f"is of another network: its {option} is {usual} instead of {value}"):
        weights_for(net, tmp_path / "bare.safetensors")


def test_another_sigma_data_is_said(tmp_path):
    trained, here = EDM(sigma_data=1.5), EDM()
    said = [f"/weights.safetensors was trained with {trained}, and continues with {here}"]
    assert taken(tmp_path, small_net(sigma_data=1.5)) == (set(), said)
