"""Which kernels there are, by how Python was started (a process each), and the debug switch."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmask.kernels
from fastmask.kernels import backends, debug_indices, embed_kept_patches, gather_tokens, restore_tokens

NO_TRITON = "import sys; sys.modules['triton'] = None\n"
ALL_REFERENCES = """
import torch
from fastmask import kernels as K
x, m, w = torch.randn(2, 4, 8), torch.randn(2, 8), torch.randn(8, 8)
K.modulate_norm(x, m, m), K.add_gated_norm(x, x, m, m, m)
K.modulated_linear(x, m, m, w, m[0]), K.add_gated_linear(x, x, m, m, m, w, m[0]), K.gelu_linear(x, w, m[0])
mask = K.sample_mask(2, 4, 3, seed=0, device="cpu")
images = torch.randn(2, 2, 4, 4)
kept = K.embed_kept_patches(images, torch.randn(8, 2, 2, 2), m[0], x[0], mask.ids_keep, patch_size=2)
K.restore_tokens(K.gather_tokens(x, mask.ids_keep) + kept, m[0], x[0], mask.ids_restore)
K.masked_loss(x, images, images, *[torch.ones(2)] * 3, mask, patch_size=2)
K.attention(*[x.unflatten(2, (2, 4))] * 3)
K.attention(*[x[0].unflatten(1, (2, 4))] * 3, cu_seqlens=torch.tensor([0, 1, 4]))
"""


def run(*arguments, interpret="0", **variables):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_everything_but_the_kernels_works_without_triton():
    done = run("-c", NO_TRITON + ALL_REFERENCES)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_missing_triton_is_said(interpret):
    code = "from fastmask.kernels.__main__ import main; main()\nfrom fastmask.kernels import require; require('cuda')"
    done = run("-c", NO_TRITON + code, interpret=interpret)
    assert "modulate_norm            cuda  none       triton is not installed: pip install triton\n" in done.stdout
    assert "modulate_norm            cpu   triton " not in done.stdout
    assert "silu_linear              cuda  torch      PyTorch's matmul" in done.stdout
    assert "BackendUnavailableError: no kernel on cuda for " in done.stderr
    assert "modulate_norm, " in done.stderr
    assert "silu_linear" not in done.stderr  # which has none there, and runs


NATIVE = Path(fastmask.kernels.__file__).with_name("_native.so").exists()


def public_ops():
    """Return the names of the functions that the package exports from its public modules, an op each."""
    exported = {name: getattr(fastmask.kernels, name) for name in fastmask.kernels.__all__}
    functions = {name: value for name, value in exported.items() if inspect.isfunction(value)}
    return {name for name, value in functions.items() if not value.__module__.split(".")[-1].startswith("_")}


def test_every_public_op_is_in_the_table_of_kernels():
    assert {"silu_linear", "attention", "patchify"} <= public_ops()
    assert {(row.op, row.device) for row in backends()} == {(op, on) for op in public_ops() for on in ("cuda", "cpu")}
    assert len(backends()) == 2 * len(public_ops())


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_table_of_kernels(interpret):
    done = run("-m", "fastmask.kernels", interpret=interpret)
    assert done.returncode == 0, done.stderr
    plain = {"attention", "patchify", "unpatchify", "random_normal", "random_uniform"}
    native = "native     this library, AVX2 or AVX-512 where the processor has them"
    unbuilt = 'none       no native kernel: impl="reference" runs'
    by_torch = "torch      PyTorch's matmul: its own kernel is native, for a CPU"
    for op in public_ops() - plain:
        on_gpu, on_cpu = "triton     ", native if NATIVE else unbuilt
        if interpret == "1":
            on_cpu = "triton     interpreted: TRITON_INTERPRET=1"
        if op == "silu_linear":
            on_gpu, on_cpu = by_torch, native if NATIVE and interpret == "0" else by_torch
        assert f"{op:<24} cuda  {on_gpu}" in done.stdout
        assert f"{op:<24} cpu   {on_cpu}\n" in done.stdout
    for op in plain:
        assert f"{op:<24} cuda  torch " in done.stdout
        assert f"{op:<24} cpu   torch " in done.stdout
    assert "attention by torch       cpu   torch " in done.stdout


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built here")
def test_where_a_native_kernel_takes_the_tensors_it_is_the_default():
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastmask.kernels import gelu_linear

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        print(func.name())
        return func(*args, **(kwargs or {}))

for dtype, width in ((torch.float32, 8), (torch.float64, 8), (torch.float32, 7)):
    print("--")
    with Seen():
        gelu_linear(*(torch.ones(s, dtype=dtype) for s in ((2, width), (3, width), (3,))))
"""
    taken, double, odd = run("-c", code).stdout.split("--\n")[1:]
    assert "fastmask::gelu_fwd" in taken
    assert "aten::gelu" in double
    assert "aten::gelu" in odd


def test_without_a_native_kernel_or_the_interpreter_the_fused_form_says_what_to_do(tmp_path):
    code = """
import torch
from fastmask.kernels import sample_mask
sample_mask(2, 8, 4, seed=0, offset=0, device="cpu", impl="fused")
"""
    done = run("-c", code, FASTMASK_NATIVE=str(tmp_path / "none.so"))
    said = 'BackendUnavailableError: fastmask::sample_mask_fwd has no CPU kernel: pass impl="reference", or set'
    assert said in done.stderr


@pytest.fixture
def _debugging():
    debug_indices()
    yield
    debug_indices(False)


@pytest.mark.parametrize("bad", [-1, 4])
@pytest.mark.usefixtures("_debugging")
def test_the_debug_switch_finds_indices_out_of_range(bad):
    ids = torch.tensor([[0, bad]], dtype=torch.int32)
    message = rf"of shape \(1, \d\) holds {bad}, which is outside 0 .. 3"
    with pytest.raises(ValueError, match=f"ids_keep {message}"):
        gather_tokens(torch.zeros(1, 4, 8), ids, impl="fused")
    restore = torch.tensor([[0, 1, 2, bad]], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"ids_restore {message}"):
        restore_tokens(torch.zeros(1, 2, 8), torch.zeros(8), torch.zeros(4, 8), restore, impl="fused")
    patches = torch.zeros(1, 1, 4, 4), torch.zeros(8, 1, 2, 2), torch.zeros(8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=f"ids_keep {message}"):
        embed_kept_patches(*patches, ids, patch_size=2, impl="fused")


def test_an_interpreter_that_fails_with_a_newer_numpy_says_so():
    """Instead of numpy's "only 0-dimensional arrays can be converted", from the middle of a kernel."""
    code = """
import importlib.metadata
import torch
from fastmask import kernels as K
from fastmask.kernels import _dispatch
from fastmask.kernels.__main__ import main
real = importlib.metadata.version
for triton, numpy in (("3.6.0", "2.4.6"), ("3.6.0", "2.3.5"), ("3.7.0", "2.4.6")):
    versions = {"triton": triton, "numpy": numpy}
    importlib.metadata.version = lambda name: versions.get(name) or real(name)
    _dispatch._interpreter_fault.cache_clear()
    main()
    try:
        K.gelu_linear(torch.randn(2, 8), torch.randn(8, 8), torch.randn(8), impl="fused")
        print("it ran")
    except K.BackendUnavailableError as error:
        print(error)
    print("--")
"""
    done = run("-c", code, interpret="1")
    assert done.returncode == 0, done.stderr
    fails, *work = done.stdout.split("\n--\n")[:3]
    fault = "triton 3.6.0 needs a numpy below 2.4 for it, not 2.4.6: install that, or triton 3.7"
    assert f"none       {fault}\n" in fails
    assert fails.endswith(f" cannot be interpreted: {fault}")
    assert "interpreted: TRITON_INTERPRET=1" not in fails
    assert len(work) == 2
    for said in work:
        assert "interpreted: TRITON_INTERPRET=1" in said
        assert said.endswith("\nit ran")
