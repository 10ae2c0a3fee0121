"""Safe reading of weight files: `.safetensors`, and `.pt` without executing code (only tensors are built)."""

import collections
import contextlib
import hashlib
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmask.console import say

# Suffixes of torch.save files: torch, Lightning, Hugging Face and timm (`.pth.tar`).
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Errors raised for damaged or unrelated files; a pickle can raise almost any.
_UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, LookupError, RuntimeError, EOFError),
    *(OSError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, MemoryError),
)
# Every network has this parameter, by one of these names; anything before it is a prefix added by the file.
_FIRST, _FIRST_OF_DIFFUSERS = "x_embedder.proj.weight", "pos_embed.proj.weight"
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SHADOW, _TABLES = "shadow_params", ("pos_embed", "decoder_pos_embed")
_AVERAGE = {"ema", "shadow", "averaged", "swa"}  # words that mark a name as averaged weights
_MOST_VALUES, _MOST_LEVELS = 10**6, 8  # limits on the nested content of a file
_MAX_NAMES_SHOWN = 6
_POINTER = b"version https://git-lfs"
_CHECKSUM = "sha256"  # key of the metadata


class _Inert:
    """Placeholder for an unneeded object of a training file: accepts any arguments and stores nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Classes that training files store besides weights: arguments, paths, metrics, dates. None of them is constructed: a
# numpy.dtype with a forged state, for example, reads and writes memory.
_INERT = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath", "PureWindowsPath")
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "datetime.datetime", "datetime.date", "datetime.timedelta"),
)
# Excluding torch's own classes, which torch checks itself.
_KNOWN = {*_INERT, "_codecs.encode", "collections.OrderedDict", "collections.Counter"}
_KNOWN |= {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")}


def read_weights(path: Path, average: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the network in a file, on the CPU, by name without prefixes, and the file's metadata.

    Training files (`model`, `ema`, ..; `state_dict_ema`; Lightning's `state_dict`) and files of several networks
    (`online_model.`, `ema_model.`) are supported; by default the averaged weights are read.

    Args:
        path: a `.safetensors` or `.pt` file.
        average: whether to prefer averaged or raw weights, if the file has both.

    Raises:
        ValueError: a missing or unreadable file, a checksum mismatch, or ambiguous content; the message lists it.
    """
    content, stated = read_tensors(path)
    return choose_weights(content, str(path), average), stated


def read_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """Return the content of a file unchanged, with tensors on the CPU, and the metadata of a `.safetensors` file.

    Raises:
        ValueError: a missing or unreadable file, or a checksum mismatch.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is not a file: name a .pt or .safetensors file of weights")
    if path.suffix not in (".safetensors", *_PICKLED):
        raise ValueError(f"{path}: weights are read from .safetensors, .pt, .pth, .ckpt and .bin files")
    try:
        if path.suffix != ".safetensors":
            return _unpickle(path), {}
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stated: dict[str, str] = file.metadata() or {}
    except _UNREADABLE as error:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{path} cannot be read as weights: Git LFS has the file, run git lfs pull") from error
        raise ValueError(f"{path} cannot be read as weights: {_reason(error)}") from error
    if _CHECKSUM in stated and stated[_CHECKSUM] != checksum_of(tensors, stated):
        raise ValueError(f"{path} is damaged: its tensors differ from the checksum that it states")
    return tensors, stated


def save_tensors(path: Path, tensors: Mapping[str, Tensor], stated: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file; equal tensors and metadata give equal bytes.

    Args:
        path: the file.
        tensors: contiguous tensors on the CPU, by name.
        stated: metadata; None writes none.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(stated) if stated else None)
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OSError(f"{path} cannot be written: {error}") from error
    if stated:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a `.safetensors` file by key in place: safetensors writes them in an arbitrary order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "safetensors writes the header as compactly"
        file.seek(8)
        file.write(text.ljust(size))


def with_checksum(tensors: Mapping[str, Tensor], stated: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a `.safetensors` file with the checksum that `read_tensors` verifies."""
    return {**stated, _CHECKSUM: checksum_of(tensors, stated)}


def checksum_of(tensors: Mapping[str, Tensor], stated: Mapping[str, str]) -> str:
    """Return the SHA-256 of contiguous tensors with names, dtypes and shapes, and of the metadata."""
    digest = hashlib.sha256(repr(sorted((key, stated[key]) for key in stated if key != _CHECKSUM)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def choose_weights(content: Any, what: str, average: bool = True) -> dict[str, Tensor]:
    """Select the tensors of one network from a training file or mapping, by name without prefixes.

    Args:
        content: nested mappings and sequences that contain tensors.
        what: the source, for messages.
        average: whether to prefer averaged or raw weights, if there are both.

    Raises:
        ValueError: no network, several candidates, or values that are not plain tensors.
    """
    # Find the networks by the name of their first parameter, and choose one.
    leaves: dict[str, Any] = {}
    for name, leaf in _leaves(content, what):
        if leaves.setdefault(name, leaf) is not leaf and isinstance(leaf, Tensor):
            raise ValueError(f"{what} holds {name} twice, with and without what a wrapper adds to its name")
    firsts = (_FIRST, _FIRST_OF_DIFFUSERS)
    leaves = _with_named_average(leaves, what)
    names = [name.removesuffix(first) for name in leaves for first in firsts if f".{name}".endswith(f".{first}")]
    averages = [name for name in names if _is_average(name)]
    others = [name for name in names if name not in averages]
    wanted = averages if average and averages else others
    if not names:
        _refuse_other_content(leaves, content, what)
    if not average and not others:
        raise ValueError(f"{what} holds averaged weights alone, in {_listed(averages)}: leave --weights raw out")
    unread = {re.sub(r"\.\[\d+\]$", "", name) for name, leaf in leaves.items() if _is_unread(name, leaf)}
    if average and not averages and unread:
        raise ValueError(
            f"{what} holds an average that does not say which parameters it is of ({_listed(sorted(unread))}): save it "
            f"by their names, or take the raw weights of {_listed(others)} (fastmask.sample --weights raw)"
        )
    if len(wanted) > 1:
        raise ValueError(f"{what} holds several networks, in {_listed(wanted)}: save the one that is meant alone")
    if len(names) > 1:
        say(f"{what}: of the networks in {_listed(names)} taking {_listed(wanted)}")
    # Take its parameters, without networks nested in it.
    inner = tuple(name for name in names if name != wanted[0] and name.startswith(wanted[0]))
    found = {
        name.removeprefix(wanted[0]): leaf
        for name, leaf in leaves.items()
        if name.startswith(wanted[0]) and not name.startswith(inner)
    }
    for name, leaf in found.items():
        fault = _fault(name, leaf)
        if fault:
            raise ValueError(f"{what}: {fault}; weights are plain tensors of 16, 32 or 64-bit floats, by name")
    return found


def _with_named_average(leaves: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the leaves with the tensors of an EMA's list ``shadow_params`` named as the network that stands beside it.

    Such a list has the parameters in their order in the network, with or without the position tables, which are not
    trained. So has a state_dict; the list is named by it if all shapes agree.
    """
    lists: dict[str, list[Any]] = {}
    for name, leaf in leaves.items():
        root, separator, _ = name.rpartition(".[")
        if separator and root.split(".")[-1] == _SHADOW:
            lists.setdefault(root, []).append(leaf)
    roots = [name.removesuffix(_FIRST) for name in leaves if f".{name}".endswith(f".{_FIRST}")]
    if len(lists) != 1 or len(roots) != 1:
        return leaves
    (where, average), prefix = next(iter(lists.items())), roots[0]
    own = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    own = {name: leaf for name, leaf in own.items() if isinstance(leaf, Tensor) and "[" not in name}
    tables = {name: leaf for name, leaf in own.items() if name in _TABLES}
    for names in ([*own], [name for name in own if name not in tables]):
        pairs = dict(zip(names, average, strict=False))
        if len(names) == len(average) and all(own[name].shape == leaf.shape for name, leaf in pairs.items()):
            say(f"{what}: {where} is named by the parameters of {_listed([prefix])}, whose order and shapes it has")
            others = {name: leaf for name, leaf in leaves.items() if not name.startswith(f"{where}.[")}
            return others | {f"{where}.{name}": leaf for name, leaf in {**tables, **pairs}.items()}
    return leaves


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError for the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise ValueError(f"{what}: {bad} of the {tensor.numel()} values of {name} are not finite")


def _unpickle(path: Path) -> Any:
    """Return the content of a torch.save file; no code of objects other than tensors is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_members(archive)
    types = _types_of(path)
    modules = "torch.nn.modules."
    unknown = sorted(name for name in types - _KNOWN if not name.startswith("torch.") or name.startswith(modules))
    unknown += sorted(name for name in types if "nested" in name)  # torch does not check the sizes of nested tensors
    if unknown:
        raise ValueError(
            f"it holds a {unknown[0]}, of which no code is run: if you trust it, load it by torch.load(.., "
            f"weights_only=False) and save its state_dict alone"
        )
    with warnings.catch_warnings(), torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
        warnings.simplefilter("ignore")  # about tensor types that are refused afterwards
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_members(archive: zipfile.ZipFile) -> None:
    """Raise an error for a checksum mismatch, which torch does not check, or a compressed member of unbounded size."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its member {member.filename} is compressed, which torch.save does not do")
        if member.CRC:  # 0: written without a checksum
            with archive.open(member) as file:
                while file.read(1 << 20):
                    pass


def _types_of(path: Path) -> set[str]:
    """Return the names of classes and functions in a torch.save file; empty if it cannot be read."""
    found = set()
    # torch.load reports damaged files with a better message.
    with contextlib.suppress(*_UNREADABLE), path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
        file.seek(0)
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                pickles: list[Any] = [archive.read(name) for name in names]
        else:
            pickles = [file] * 4  # the old format: magic number, version, machine, and the object
        for one in pickles:
            for opcode, argument, _ in pickletools.genops(one):
                if opcode.name == "GLOBAL":
                    found.add(str(argument).replace(" ", ".", 1))
    return found


def _leaves(content: Any, what: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and sequences with dotted names, without the prefixes of wrappers."""
    waiting = collections.deque([("", content, 0)])
    count = 0
    while waiting:
        path, value, level = waiting.popleft()
        if isinstance(value, Mapping | list | tuple):
            count += len(value)
            if count > _MOST_VALUES or level > _MOST_LEVELS:
                raise ValueError(f"{what} holds more than a training file does: save its weights alone")
        if isinstance(value, Mapping):
            inner: Sequence[tuple[str, Any]] = [
                (key if isinstance(key, str) else f"[{key!r}]", leaf) for key, leaf in value.items()
            ]
        elif isinstance(value, list | tuple):
            inner = [(f"[{i}]", leaf) for i, leaf in enumerate(value)]
        else:
            yield _WRAPPERS.sub("", path), value
            continue
        waiting.extend((f"{path}.{key}" if path else key, leaf, level + 1) for key, leaf in inner)


def _is_average(name: str) -> bool:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return bool(words & _AVERAGE) and "online" not in words


def _is_unread(name: str, leaf: Any) -> bool:
    return _is_average(name) and isinstance(leaf, Tensor) and leaf.numel() > 1


def _fault(name: str, leaf: Any) -> str:
    """Return why a value is not a valid weight tensor; an empty string if it is."""
    if "[" in name:
        return f"{name} has a number or another key that is no string in its name"
    if type(leaf) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(leaf).__name__}"
    if leaf.layout != torch.strided:
        return f"{name} is sparse ({leaf.layout})"
    if leaf.device.type == "meta":
        return f"{name} is on the meta device and has no values"
    if leaf.dtype not in _DTYPES:
        return f"{name} is of {leaf.dtype}"
    if leaf.numel() * leaf.element_size() > leaf.untyped_storage().nbytes():
        return f"{name} is expanded to shape {tuple(leaf.shape)} from fewer values"
    return ""


def _refuse_other_content(leaves: Mapping[str, Any], content: Any, what: str) -> NoReturn:
    tensors = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor)]
    if tensors and isinstance(content, Mapping):
        raise ValueError(f"{what} is no MaskDiT: it lacks a usable {_FIRST}, and holds {_listed(tensors)}")
    held = f"the keys {_listed(list(map(str, content)))}" if isinstance(content, Mapping) else type(content).__name__
    if isinstance(content, Mapping) and not content:
        raise ValueError(f"{what} is no MaskDiT: it is empty")
    raise ValueError(f"{what} holds no mapping of names to tensors, but {held}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(name.rstrip(".") or "the top level" for name in names[:_MAX_NAMES_SHOWN]) + more


def _reason(error: BaseException) -> str:
    """Extract the relevant line of an error, which torch surrounds with advice and colours."""
    if isinstance(error, MemoryError):
        return "there is too little memory"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    said = re.search(r"WeightsUnpickler error:\s*(\S.*)", text)
    if said:
        return f"it is damaged, or not of torch.save ({said[1].strip()})"
    vague = text.startswith("Weights only load failed")
    if vague or isinstance(error, LookupError | AssertionError | AttributeError | TypeError):
        return "it is damaged, or not of torch.save"
    return (text.strip().splitlines() or ["it ends too early"])[0]
