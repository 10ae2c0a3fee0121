"""Registration of the ops with PyTorch's dispatcher, and the table of available kernels.

The caller chooses the implementation: `impl="reference"`, plain PyTorch, or `impl="fused"`, an op of this library.
PyTorch's dispatcher then chooses the kernel by the device of the tensors: Triton on a GPU; on a CPU the native kernel
of `_native.so`, if the package was built with it, or the interpreted Triton kernel, if TRITON_INTERPRET=1 was set
before Python started. There is no fallback: a missing kernel is an error.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

Impl = Literal["fused", "reference"]
_chosen: Impl | None = None  # for calls with impl=None, see `implementation`
ANY_DEVICE = "plain PyTorch, the same on every device"


class BackendUnavailableError(ValueError):
    """An op has no kernel for a device; the message suggests what to do."""


class Backend(NamedTuple):
    """The kernel of an op on a device.

    Attributes:
        op: name of the public function.
        device: "cuda" or "cpu".
        kernel: "triton", "native", "torch" if PyTorch's own operations run, or "none" if the fused form cannot run.
        reason: why the kernel is missing, or how it runs.
    """

    op: str
    device: str
    kernel: str
    reason: str


class _PublicOp(NamedTuple):
    kernels: tuple[str, ...]
    otherwise: str


_Function = TypeVar("_Function", bound=Callable[..., Any])

_PUBLIC_OPS: dict[str, _PublicOp] = {}
_TRITON_OPS: dict[str, str] = {}  # op to launcher
_NATIVE_OPS: dict[str, Callable[..., bool] | None] = {}  # op with a native kernel to what that takes
_NATIVE = Path(os.environ.get("FASTMASK_NATIVE") or Path(__file__).with_name("_native.so"))  # another build, to test it
# TRITON_INTERPRET=1, which triton reads, takes precedence over native kernels.
_NATIVE_LOADED = _NATIVE.exists() and os.environ.get("TRITON_INTERPRET") != "1"
if _NATIVE_LOADED:
    torch.ops.load_library(str(_NATIVE))  # type: ignore[no-untyped-call]


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    launcher: str = "",
    native: Callable[..., bool] | None = None,
) -> Any:
    """Define an op with a Triton kernel, a native CPU kernel (if built) or both, and return its overload.

    Args:
        schema: name, arguments and results, in PyTorch's schema language.
        fake: returns empty results with the correct shapes, strides and dtypes.
        launcher: `module:function` in `fastmask.kernels._triton`, imported at the first call of the op; empty: it has
            no Triton kernel.
        native: returns whether the native kernel takes a call, and is faster than the reference, from what the public
            function passes to `resolve_impl`; None for a backward, which follows its forward.
    """
    name, arguments = schema.split("(", 1)
    qualified = f"fastmask::{name}"
    torch.library.define(qualified, f"({arguments}")
    if launcher:
        torch.library.impl(qualified, "CUDA", lambda *args: _on_gpu(name, launcher, args))
        _TRITON_OPS[name] = launcher
    if _NATIVE_LOADED and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"):
        _NATIVE_OPS[name] = native
    elif launcher:
        torch.library.impl(qualified, "CPU", lambda *args: _interpreted(name, launcher)(*args))
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.fastmask, name).default


def public_op(*kernels: str, otherwise: str = "") -> Callable[[_Function], _Function]:
    """Decorator that registers a public function in the table of `backends`.

    Args:
        kernels: names of the ops that it calls, from `define_op`.
        otherwise: what runs without these kernels, if the fused form does not require them.
    """

    def register(function: _Function) -> _Function:
        _PUBLIC_OPS[function.__name__] = _PublicOp(kernels, otherwise)
        return function

    return register


def default_impl(device: torch.device | str) -> Impl:
    """Return the default implementation on a device: "fused" on a GPU, "reference" elsewhere.

    On a CPU, an op with a native kernel for its tensors is fused too, see `define_op`.
    """
    return "fused" if torch.device(device).type == "cuda" else "reference"


def has_native(op: str) -> bool:
    """Return whether an op has a native CPU kernel here."""
    return op in _NATIVE_OPS


def takes_native(op: str, device: torch.device, *args: Any) -> bool:
    """Return whether the native kernel of an op takes a call: its ``native`` of `define_op` for these arguments."""
    native = _NATIVE_OPS.get(op) if device.type == "cpu" else None
    return native is not None and native(*args)


def resolve_impl(impl: Impl | None, op: str, device: torch.device, *args: Any) -> Impl:
    """Return `chosen_impl`, or for None "fused" where `takes_native` is true, else the default of the device.

    Raises:
        ValueError: as in `chosen_impl`.
    """
    impl = chosen_impl(impl)
    if impl is None:
        return "fused" if takes_native(op, device, *args) else default_impl(device)
    return impl


@contextlib.contextmanager
def implementation(impl: Impl | None) -> Iterator[None]:
    """Choose the form of all ops that are called with ``impl=None`` inside the block; also a decorator.

    A compiled function is compiled once more for each choice. A backward pass has the form of its forward pass, even
    outside of the block.

    Args:
        impl: "fused", "reference", or None for the default of the device.

    Raises:
        ValueError: an unknown ``impl``.
    """
    global _chosen
    check_impl(impl)
    before, _chosen = _chosen, impl
    try:
        yield
    finally:
        _chosen = before


def chosen_impl(impl: Impl | None) -> Impl | None:
    """Return ``impl``, or for None that of `implementation`, or "reference" inside a transform of `torch.func`.

    Raises:
        ValueError: an unknown ``impl``, or "fused" inside a transform.
    """
    check_impl(impl)
    chosen = _chosen if impl is None else impl
    if transformed():
        if chosen == "fused":
            raise ValueError(
                'the fused form has no rules for torch.func and forward-mode AD: pass impl="reference", or leave impl '
                "out, which takes the reference there"
            )
        return "reference"
    return chosen


def transformed() -> bool:
    """Return whether a transform of `torch.func` (grad, vmap, jvp, ..) or forward-mode AD is at work.

    Not of a graph that is being traced, which the question would break.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def check_impl(impl: str | None) -> None:
    """Raise a ValueError unless ``impl`` is "fused", "reference" or None."""
    if impl not in (None, "fused", "reference"):
        raise ValueError(f'impl must be "fused", "reference" or None, not {impl!r}')


def backends() -> list[Backend]:
    """Return the kernel of each public op on GPU and CPU."""
    return [_backend(name, device) for name in sorted(_PUBLIC_OPS) for device in ("cuda", "cpu")]


def require(device: torch.device | str) -> None:
    """Raise a `BackendUnavailableError` unless every op has a kernel for the device."""
    kind = torch.device(device).type
    missing = [row for row in backends() if row.device == kind and row.kernel == "none"]
    if missing:
        names = ", ".join(row.op for row in missing)
        raise BackendUnavailableError(f"no kernel on {kind} for {names}: {missing[0].reason}")


_NO_TRITON = "triton is not installed: pip install triton"


def _backend(name: str, device: str) -> Backend:
    kernels, otherwise = _PUBLIC_OPS[name]
    in_triton = bool(kernels) and _TRITON_OPS.keys() >= set(kernels)
    installed = importlib.util.find_spec("triton") is not None
    if device == "cuda":
        if in_triton and installed:
            gpu = "this machine has one" if torch.cuda.is_available() else "no GPU in this machine"
            return Backend(name, device, "triton", gpu)
        missing = _NO_TRITON
    else:
        if in_triton and installed and _interpreting():
            fault = _interpreter_fault()
            return Backend(name, device, "none" if fault else "triton", fault or "interpreted: TRITON_INTERPRET=1")
        if kernels and _NATIVE_OPS.keys() >= set(kernels):
            return Backend(name, device, "native", "this library, AVX2 or AVX-512 where the processor has them")
        missing = 'no native kernel: impl="reference" runs'
    return Backend(name, device, "torch", otherwise) if otherwise else Backend(name, device, "none", missing)


def _on_gpu(name: str, launcher: str, args: tuple[Any, ...]) -> Any:
    """Launch on the GPU of the tensors, which can differ from the current device."""
    where = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(where):
        return _launcher(name, launcher)(*args)


@functools.cache  # called with every op
def _launcher(name: str, launcher: str) -> Callable[..., Any]:
    module, function = launcher.split(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(f"fastmask.kernels._triton.{module}"), function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise BackendUnavailableError(f"fastmask::{name} needs triton on a GPU; {_NO_TRITON}") from None
    return found


def _interpreted(name: str, launcher: str) -> Callable[..., Any]:
    if importlib.util.find_spec("triton") is None or not _interpreting():
        raise BackendUnavailableError(
            f'fastmask::{name} has no CPU kernel: pass impl="reference", or set TRITON_INTERPRET=1 before Python '
            f"starts to run its Triton kernel interpreted (slow)"
        )
    if fault := _interpreter_fault():
        raise BackendUnavailableError(f"fastmask::{name} cannot be interpreted: {fault}")
    return _launcher(name, launcher)


def _interpreting() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@functools.cache
def _interpreter_fault() -> str:
    """Return why Triton's interpreter fails with the installed numpy; an empty string if it works."""
    found = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    triton, numpy = (tuple(map(int, version.split(".")[:2])) for version in found.values())
    if triton >= (3, 7) or numpy < (2, 4):
        return ""
    return f"triton {found['triton']} needs a numpy below 2.4 for it, not {found['numpy']}: install that, or triton 3.7"
