"""Files of weights that others wrote, in whatever they are wrapped, and what is no weights."""

import argparse
import collections
import datetime
import functools
import os
import pathlib
import pickle
import types
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from util import small_net

from fastmask.diffusion.weights import save_weights
from fastmask.tensorfile import choose_weights, read_tensors, read_weights, save_tensors

NET, EMA = small_net(depth=1, decoder_depth=1), small_net(depth=1, decoder_depth=1, seed=1)
RAW, AVERAGE = ({k.removeprefix("model."): t for k, t in net.state_dict().items()} for net in (NET, EMA))


def prefixed(prefix, weights=RAW):
    return {prefix + name: tensor for name, tensor in weights.items()}


def assert_is(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def refused(content, match, average=True):
    """Return the line that says why a file or a mapping is refused."""
    read = read_weights if isinstance(content, pathlib.Path) else functools.partial(choose_weights, what="it")
    with pytest.raises(ValueError, match=match) as error:
        read(content, average=average)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    return str(error.value)


def inside(name, wrapper):
    """Return a parameter's name as a wrapper around each block and around the network gives it."""
    return wrapper + name.replace("blocks.0.", f"blocks.0.{wrapper}")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.net.", "denoiser.model."])
def test_names_as_wrappers_make_them(tmp_path, wrapper, prefix, suffix):
    weights = {prefix + inside(name, wrapper): tensor for name, tensor in RAW.items()}
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    assert_is(read_weights(path)[0], RAW)


OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-4}]}
TWO_SETS = {
    "MaskDiT's, DiT's": {"model": RAW, "ema": AVERAGE, "opt": OPTIMIZER},
    "under DDP": {"model": prefixed("module."), "ema": AVERAGE},
    "timm": {"epoch": 3, "arch": "x", "state_dict": RAW, "state_dict_ema": prefixed("module.", AVERAGE)},
    "Lightning": {
        "state_dict": {**prefixed("model."), **prefixed("ema_model.", AVERAGE), "vae.conv": torch.ones(2)},
        "optimizer_states": [OPTIMIZER],
        "pytorch-lightning_version": "2.5",
    },
    "ema_pytorch": {
        **prefixed("online_model.model."),
        **prefixed("ema_model.model.", AVERAGE),
        "initted": torch.tensor(True),
        "step": torch.tensor(7),
    },
    "ema_pytorch beside a model": {"ema": {**prefixed("online_model."), **prefixed("ema_model.", AVERAGE)}},
    "nested": {"state": {"net": {"model_state_dict": RAW}, "ema_state_dict": AVERAGE}},
}


@pytest.mark.parametrize("form", TWO_SETS)
def test_training_files_of_others_give_their_average_or_the_raw_weights(tmp_path, form, capsys):
    torch.save(TWO_SETS[form], tmp_path / "it.pt")
    assert_is(read_weights(tmp_path / "it.pt")[0], AVERAGE)
    assert_is(read_weights(tmp_path / "it.pt", average=False)[0], RAW)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(" of the networks in " in line for line in lines)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_a_training_file_without_an_average_gives_what_it_has(key, capsys):
    for average in (True, False):
        assert_is(choose_weights({key: RAW, "opt": OPTIMIZER, "step": 3}, "it", average), RAW)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"model": RAW, "ema": {"decay": 0.999, "shadow_params": [*RAW.values()][1:]}}, "ema.shadow_params"),
        ({"model": RAW, "ema": {"shadow_params": [*RAW.values()][::-1]}}, "ema.shadow_params"),
        ({"model": RAW, "ema": tuple(RAW.values())}, "ema"),
        ({"state_dict": RAW, "optimizer_states": [{"ema": list(RAW.values())}]}, r"optimizer_states\.\[0\]\.ema"),
        ({**prefixed("model."), "model_ema.x_embedderprojweight": torch.ones(4)}, "model_ema.x_embedderprojweight"),
    ],
    ids=["too few", "another order", "list", "NeMo", "LitEma"],
)
def test_an_average_without_names_is_not_passed_over(content, where):
    refused(content, rf"it holds an average that does not say which parameters it is of \({where}\): save it by")
    assert_is(choose_weights(content, "it", average=False), RAW)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_a_list_of_averages_is_named_by_the_network_beside_it(prefix, trained, capsys):
    """Of score_sde, torch_ema and diffusers: all parameters, or those that are trained, in the network's order."""
    tables = {"pos_embed", "decoder_pos_embed"}
    average = [tensor for name, tensor in AVERAGE.items() if not (trained and name in tables)]
    content = {"model": prefixed(prefix), "ema": {"decay": 0.999, "shadow_params": average}, "opt": OPTIMIZER}
    assert_is(choose_weights(content, "it"), AVERAGE)
    said = capsys.readouterr().out
    assert "it: ema.shadow_params is named by the parameters of model" in said
    assert_is(choose_weights(content, "it", average=False), RAW)


def test_what_cannot_be_told_apart_is_refused():
    refused({"a": RAW, "b": AVERAGE}, "it holds several networks, in a, b: save the one that is meant alone")
    refused({"ema": RAW, "ema2": {}, "model_ema": AVERAGE}, "it holds several networks, in ema, model_ema: save")
    refused({"ema": RAW}, "it holds averaged weights alone, in ema: leave --weights raw out", average=False)
    refused({**prefixed("_orig_mod."), **AVERAGE}, r"it holds \S+ twice, with and without what a wrapper adds")


def test_what_is_there_is_named(tmp_path):
    assert refused({}, "it is no MaskDiT: it is empty")
    refused({"conv.weight": torch.ones(2), "conv.bias": torch.ones(2)}, "and holds conv.weight, conv.bias$")
    refused({"_flat_param": torch.ones(2)}, "it lacks a usable x_embedder.proj.weight, and holds _flat_param$")
    for content, held in [([1, 2], "list"), (3, "int"), ({"epoch": 3, "lr": 1}, "the keys epoch, lr")]:
        torch.save(content, tmp_path / "it.pt")
        refused(tmp_path / "it.pt", rf"it\.pt holds no mapping of names to tensors, but {held}$")


HARMLESS = {
    "a Path": pathlib.Path("configs/train.yaml"),
    "a pure path": pathlib.PurePosixPath("a"),
    "a numpy number": np.float32(3.5),
    "a numpy array": np.ones(3),
    "a numpy dtype": np.dtype("float32"),
    "a Namespace": argparse.Namespace(lr=1e-4, out=pathlib.Path("a"), best=np.float64(2.0)),
    "a SimpleNamespace": types.SimpleNamespace(lr=1),
    "a date": datetime.datetime(2026, 1, 1),
    "a set": {1, 2},
    "an OrderedDict": collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("name", HARMLESS)
def test_arguments_beside_the_weights_are_passed_over(tmp_path, name, is_zip):
    content = {"model": RAW, "args": HARMLESS[name], "best": [HARMLESS[name]]}
    torch.save(content, tmp_path / "it.pt", _use_new_zipfile_serialization=is_zip)
    assert_is(read_weights(tmp_path / "it.pt")[0], RAW)


class Calls:
    """Is unpickled by a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Own:
    pass


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_no_code_of_a_file_is_run(tmp_path, is_zip):
    ran, path = tmp_path / "ran", tmp_path / "it.pt"
    for args, named in [
        (Calls(os.mkdir, str(ran)), "posix.mkdir"),
        (Calls(eval, f"open({str(ran)!r}, 'w')"), r"__builtin__\.eval"),
        (Own(), r"\S*test_tensorfile\.Own"),
    ]:
        torch.save({"model": RAW, "args": args}, path, _use_new_zipfile_serialization=is_zip)
        refused(
            path, rf"it\.pt cannot be read as weights: it holds a {named}, of which no code is run: if you trust it"
        )
        assert not ran.exists()


def test_a_whole_module_is_not_built(tmp_path):
    torch.save(NET, tmp_path / "it.pt")
    refused(
        tmp_path / "it.pt",
        r"it holds a fastmask\.\S+, of which no code is run: .*state_dict alone",
    )
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "it.pt")
    refused(tmp_path / "it.pt", r"it holds a torch\.nn\.modules\.linear\.Linear, of which no code is run")


def test_objects_that_are_passed_over_are_not_built(tmp_path):
    """A numpy array of 8 TB, and a dtype whose state is made up, which numpy takes without a look."""
    state = (3, "|", None, None, None, -1, -1, 1 << 40)
    torch.save({"model": RAW, "args": Calls(np.ndarray, (10**12,))}, tmp_path / "a.pt")
    torch.save({"model": RAW, "args": Calls(pathlib.Path, [1], {"a": object})}, tmp_path / "b.pt", pickle_protocol=2)
    assert_is(read_weights(tmp_path / "a.pt")[0], RAW)

    class Dtype(Calls):
        def __reduce__(self):
            return np.dtype, ("V8", False, True), state

    torch.save({"model": RAW, "args": Dtype(None)}, tmp_path / "c.pt")
    assert_is(read_weights(tmp_path / "c.pt")[0], RAW)


TABLE = "y_embedder.embedding_table.weight"
BAD_TENSORS = {
    "integers": (lambda t: t.int(), f"{TABLE} is of torch.int32"),
    "bool": (lambda t: t > 0, f"{TABLE} is of torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), f"{TABLE} is of torch.complex64"),
    "8 bits": (lambda t: t.to(torch.float8_e4m3fn), f"{TABLE} is of torch.float8_e4m3fn"),
    "meta": (lambda t: t.to("meta"), f"{TABLE} is on the meta device and has no values"),
    "sparse": (lambda t: t.to_sparse(), rf"{TABLE} is sparse \(torch.sparse_coo\)"),
    "csr": (lambda t: t.to_sparse_csr(), rf"{TABLE} is sparse \(torch.sparse_csr\)"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), f"{TABLE} is of torch.qint8"),
    "expanded": (
        lambda t: torch.ones(1, 1).expand(10**6, 10**6),
        rf"{TABLE} is expanded to shape \(1000000, 1000000\) from fewer values",
    ),
    "a list": (lambda t: "none", f"{TABLE} is a str"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_what_is_no_plain_tensor_is_refused(tmp_path, name):
    make, message = BAD_TENSORS[name]
    bad = {**RAW, TABLE: make(RAW[TABLE])}
    refused(bad, f"it: {message}; weights are plain tensors of 16, 32 or 64-bit floats, by name")
    torch.save({"model": bad}, tmp_path / "it.pt")
    refused(tmp_path / "it.pt", message)


def test_nested_tensors_are_not_built(tmp_path):
    torch.save({**RAW, TABLE: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "it.pt")
    refused(tmp_path / "it.pt", r"it holds a torch\._utils\._rebuild_nested_tensor, of which no code is run")


def test_names_that_are_no_strings():
    for key in (3, None, (1, 2), 2.5):
        refused({**RAW, key: torch.ones(2)}, r"it: \[.*\] has a number or another key that is no string in its name")


def test_content_without_end():
    endless = {"model": RAW}
    endless["again"] = endless
    deep = []
    for _ in range(10_000):
        deep = [deep]
    wide = [[[[[[[0] * 30] * 30] * 30] * 30] * 30]]
    for content in (endless, {"model": RAW, "x": deep}, {"model": RAW, "x": wide}):
        refused(content, "it holds more than a training file does: save its weights alone")


def test_a_flipped_bit_of_a_pt_file_is_found(tmp_path):
    torch.save({"model": RAW}, tmp_path / "it.pt")
    content = bytearray((tmp_path / "it.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "it.pt") as archive:
        at = content.index(bytes(RAW["pos_embed"].numpy()[0, 5].data))
        assert archive.testzip() is None
    content[at] ^= 1
    (tmp_path / "it.pt").write_bytes(content)
    refused(tmp_path / "it.pt", r"it\.pt cannot be read as weights: Bad CRC-32 for file '.*data/\d+'")


def test_a_pt_file_that_was_saved_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": RAW}, tmp_path / "it.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_is(read_weights(tmp_path / "it.pt")[0], RAW)


def test_a_compressed_file_is_not_inflated(tmp_path):
    torch.save({"model": RAW}, tmp_path / "it.pt")
    with (
        zipfile.ZipFile(tmp_path / "it.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refused(tmp_path / "b.pt", r"b\.pt cannot be read as weights: its member \S+ is compressed, which torch.save")


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "it.pt", "w") as archive:
        archive.writestr("readme.txt", "not weights")
    refused(tmp_path / "it.pt", r"it\.pt cannot be read as weights: \S")


def test_too_little_memory(tmp_path, monkeypatch):
    torch.save(RAW, tmp_path / "it.pt")
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=MemoryError))
    refused(tmp_path / "it.pt", r"it\.pt cannot be read as weights: there is too little memory$")


def test_a_file_that_git_lfs_has_not_fetched(tmp_path):
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"it{suffix}"
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
        refused(path, "cannot be read as weights: Git LFS has the file, run git lfs pull")


def test_a_flipped_bit_of_a_file_of_ours_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "it.safetensors"
    save_weights(path, NET)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    for at in [*range(0, header, 37), *range(header, len(content), 1999)]:
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        if b'"sha256"' not in changed:  # a checksum under another name: the tensors are good
            continue
        path.write_bytes(changed)
        refused(path, r"it\.safetensors (is damaged: its tensors differ from|cannot be read as weights)")
    path.write_bytes(content)
    assert_is(read_weights(path)[0], RAW)


def test_advice_and_colours_of_torch_are_left_out(tmp_path, monkeypatch):
    torch.save(RAW, tmp_path / "it.pt")
    for said, shown in [
        ("Weights only load failed. \x1b[1mDo those steps\x1b[0m.\n(1) Re-run", "it is damaged, or not of torch.save"),
        ("\x1b[1mno\x1b[0m good\nat all", "no good"),
        ("Weights only load failed.\nWeightsUnpickler error: \n\nbad\n\nmore", r"it is damaged, or not .*\(bad\)"),
    ]:
        monkeypatch.setattr(torch, "load", mock.Mock(side_effect=pickle.UnpicklingError(said)))
        refused(tmp_path / "it.pt", rf"it\.pt cannot be read as weights: {shown}$")


def test_a_pickle_is_judged_before_it_is_loaded(tmp_path):
    """What torch itself says of an unknown class is several lines with colours."""
    (tmp_path / "it.pt").write_bytes(pickle.dumps({"a": Own()}, protocol=2))
    refused(tmp_path / "it.pt", r"it holds a \S*test_tensorfile\.Own")


def test_metadata_are_in_the_order_of_their_keys(tmp_path):
    """Whatever is in them: quotes, control characters, letters beyond ASCII."""
    stated = {f"{letter}é\u2028": f'"{letter}\\\x01\x7f\n/' for letter in "zyxwvu"}
    save_tensors(tmp_path / "a.safetensors", RAW, stated)
    save_tensors(tmp_path / "b.safetensors", RAW, dict(reversed(stated.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    tensors, read = read_tensors(tmp_path / "a.safetensors")
    assert_is(tensors, RAW)
    assert read == stated
