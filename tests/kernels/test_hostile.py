"""Arguments that do not fit: on a CPU no call crashes the process or returns what was not written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import CALLS
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask import kernels
from fastmask.kernels import Mask, adamw_ema, backends, masked_loss, restore_tokens
from fastmask.kernels.adamw_ema import _adamw_ema
from fastmask.kernels.modulate_norm import modulate_norm_fwd
from fastmask.kernels.restore_tokens import restore_tokens_bwd

NATIVE = any(row[:3] == ("modulate_norm", "cpu", "native") for row in backends())
native = pytest.mark.skipif(not NATIVE, reason="no native kernels here")
IMPLS = pytest.mark.parametrize("impl", ["fused", "reference", None])
BUILT = Path(kernels.__file__).with_name("_native.so").exists()

PACKED = sorted(op for op, call in CALLS.items() if "cu_seqlens" in call(True))
# Of 9 rows. The last are within them, and give a sample more rows than its 4 positions.
BOUNDS = {
    "begins late": ([1, 4, 6, 9], "not from 1 to 9"),
    "ends early": ([0, 4, 6, 8], "not from 0 to 8"),
    "ends behind": ([0, 4, 6, 2_000_000], "not from 0 to 2000000"),
    "negative": ([-3, 4, 6, 9], "not from -3 to 9"),
    "falls": ([0, 6, 4, 9], "falls from 6 to 4 at sample 1"),
    "leaves": ([0, -5, 6, 9], "falls from 0 to -5 at sample 0"),
    "of 32 bits at most": ([0, 2**31 - 1, -(2**31), 9], f"falls from {2**31 - 1} to {-(2**31)} at sample 1"),
}


def with_bounds(op, bounds, dtype=torch.int32):
    return CALLS[op](True) | {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}


def test_the_ops_with_packed_tokens():
    assert len(PACKED) == 8
    assert not {"masked_loss", "sample_mask"} & set(PACKED)  # which take them as a mask, or make them


@IMPLS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("bounds", "message"), BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("op", PACKED)
def test_cu_seqlens_that_do_not_rise_to_the_rows(op, bounds, message, dtype, impl):
    with pytest.raises(ValueError, match=f"cu_seqlens must rise from 0 to the 9 .*, .*{message}"):
        getattr(kernels, op)(**with_bounds(op, bounds, dtype), impl=impl)


@IMPLS
@pytest.mark.parametrize(("bounds", "message"), BOUNDS.values(), ids=BOUNDS)
def test_a_mask_s_cu_seqlens_that_do_not_rise_to_the_rows(bounds, message, impl):
    arguments = CALLS["masked_loss"](True)
    mask = arguments["mask"]._replace(cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=f"cu_seqlens must rise from 0 to the 9 .*, .*{message}"):
        masked_loss(**arguments | {"mask": mask}, impl=impl)


@IMPLS
@pytest.mark.parametrize("op", ["embed_kept_patches", "gather_tokens", "restore_tokens", "masked_loss"])
def test_samples_of_more_rows_than_positions(op, impl):
    wide = torch.tensor([0, 2, 4, 9])
    arguments = CALLS[op](True)
    if op == "masked_loss":
        arguments["mask"] = arguments["mask"]._replace(cu_seqlens=wide)
    else:
        arguments["cu_seqlens"] = wide
    with pytest.raises(ValueError, match=r"cu_seqlens gives sample 2 5 .*, more than its 4 positions"):
        getattr(kernels, op)(**arguments, impl=impl)


@IMPLS
def test_more_kept_tokens_than_positions(impl):
    """The gradients of the tokens that have no position were not written; a loss counted positions that are none."""
    tokens = CALLS["restore_tokens"](False) | {"x": torch.randn(3, 6, 8)}
    with pytest.raises(ValueError, match=r"x of shape \(3, 6, 8\) has more tokens than the 4 positions"):
        restore_tokens(**tokens, impl=impl)
    wide = torch.arange(4).repeat(3, 2)[:, :6]
    for op in ("embed_kept_patches", "gather_tokens"):
        with pytest.raises(ValueError, match=r"ids_keep of shape \(3, 6\) keeps more than the 4 positions of "):
            getattr(kernels, op)(**CALLS[op](False) | {"ids_keep": wide}, impl=impl)
    arguments = CALLS["masked_loss"](False)
    mask = Mask(wide, arguments["mask"].ids_restore)
    with pytest.raises(
        ValueError, match=r"mask.ids_keep of shape \(3, 6\) keeps more than the 4 positions of a sample"
    ):
        masked_loss(**arguments | {"mask": mask}, impl=impl)


@IMPLS
@pytest.mark.parametrize("name", ["copies", "averages", "grads", "exp_avgs", "exp_avg_sqs"])
def test_an_update_of_tensors_on_another_device(name, impl):
    arguments = CALLS["adamw_ema"](False)
    lists = arguments[name][0] if name == "averages" else arguments[name]
    lists[1] = lists[1].to("meta")
    named = r"averages\[0\]" if name == "averages" else name
    before = arguments["params"][0].clone()
    with pytest.raises(ValueError, match=rf"^{named}\[1\] must be on cpu, like its parameter, not on meta$"):
        adamw_ema(**arguments, impl=impl)
    assert torch.equal(arguments["params"][0], before)


@IMPLS
@pytest.mark.parametrize("shape", [(0,), (2,)])
def test_a_step_that_is_no_number(shape, impl):
    arguments = CALLS["adamw_ema"](False)
    arguments["steps"][0] = torch.ones(shape)
    with pytest.raises(ValueError, match=rf"steps\[0\] must hold one value, not {shape[0]}"):
        adamw_ema(**arguments, impl=impl)


@pytest.mark.parametrize("ids", [[0, 0, 2, 3], [1, 1, 2, 3]])
def test_positions_that_are_no_permutation(ids):
    """Rows that no position takes would get no gradient. The native kernels see it when they run backward."""
    arguments = CALLS["restore_tokens"](False) | {"ids_restore": torch.tensor([ids] * 3), "impl": "fused"}
    arguments["x"].requires_grad_()
    if not NATIVE:
        with pytest.raises(
            ValueError, match=r"ids_restore must be a permutation of 0 .. 3 for each sample, and 0's is"
        ):
            restore_tokens(**arguments)
        return
    restored, _ = restore_tokens(**arguments)
    with pytest.raises(RuntimeError, match=f"ids_restore holds {ids[0]} twice for sample 0"):
        restored.sum().backward()
    kernels.debug_indices()
    try:
        with pytest.raises(ValueError, match=r"ids_restore must be a permutation of 0 .. 3"):
            restore_tokens(**arguments)
    finally:
        kernels.debug_indices(False)


@native
def test_a_registered_op_checks_by_itself():
    x, modulation = torch.randn(9, 8), torch.randn(3, 8)
    bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    options = (bounds, False, 1e-6, torch.float32)
    for changed, message in (
        ((x[:0], modulation, modulation, *options), "cu_seqlens must end with 0, the number of rows, not 9"),
        ((x, modulation[:2], modulation, *options), r"scale must have shape \(2, 8\), not \(3, 8\)"),
        ((x, modulation, modulation[:, :4], *options), r"scale must have shape \(3, 8\), not \(3, 4\)"),
        ((x.mT.contiguous().mT, modulation, modulation, *options), "x must be contiguous"),
        ((x.double(), modulation, modulation, *options), "x must be float32, bfloat16 or float16"),
        ((x, modulation, modulation, bounds.long(), *options[1:]), "cu_seqlens must be int32"),
        ((x, modulation, modulation, bounds + 1, *options[1:]), "cu_seqlens must begin with 0, not 1"),
        ((x, modulation, modulation, *options[:3], torch.int32), "out_dtype must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            modulate_norm_fwd(*changed)
    ids = torch.arange(4, dtype=torch.int32).expand(3, 4).contiguous()
    with pytest.raises(RuntimeError, match="6 rows to a sample are more than 4"):
        restore_tokens_bwd(torch.zeros(12, 8), None, torch.zeros(8), ids, None, 18, torch.float32)
    one = [torch.ones(3)]
    lists = (one, one, one, one, [], [], [torch.ones(0)])
    with pytest.raises(RuntimeError, match="steps must hold one value, not 0"):
        _adamw_ema(*lists, torch.tensor(0.1), torch.ones(0), None, None, 0.9, 0.999, 1e-8, 0.0)


@pytest.mark.parametrize("op", ["modulate_norm", "restore_tokens"])
def test_a_graph_holds_no_checks_of_values(op):
    """torch.compile takes them as they are: then a native kernel checks, and one for a GPU does not."""
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, op), fullgraph=True, backend="aot_eager")
    fitting = CALLS[op](True) | {"impl": "fused"}
    expected = getattr(kernels, op)(**fitting)
    for actual, right in zip(compiled(**fitting), expected, strict=True):
        assert torch.equal(actual, right)
    if NATIVE:
        with pytest.raises(RuntimeError, match="cu_seqlens must end with 9, the number of rows, not 8"):
            compiled(**fitting | {"cu_seqlens": torch.tensor([0, 4, 6, 8], dtype=torch.int32)})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_have_no_values_to_check(device):
    with FakeTensorMode():
        x, modulation = torch.empty(9, 8, device=device), torch.empty(3, 8, device=device)
        bounds = torch.empty(4, dtype=torch.int32, device=device)
        assert kernels.modulate_norm(x, modulation, modulation, cu_seqlens=bounds, impl="fused").shape == (9, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("op", sorted({*PACKED, "masked_loss"} - {"attention"}))
def test_on_a_gpu_no_check_waits(op):
    arguments = CALLS[op](True)
    if op == "masked_loss":
        arguments["mask"] = Mask(*(ids.cuda() for ids in arguments["mask"]))
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    getattr(kernels, op)(**on_gpu)  # which compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(kernels, op)(**on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.once
@pytest.mark.parametrize(("interpreted", "threads"), [(False, 1), (False, 2), (True, 1)])
def test_arguments_made_up(interpreted, threads, tmp_path):
    """A few seconds of `hostile.py`, which runs for as long as one likes; a crash names its case."""
    if not interpreted and not BUILT:
        pytest.skip("the native kernels are not built here")
    script, log, seed = Path(__file__).with_name("hostile.py"), tmp_path / "log", 10 + threads
    command = [sys.executable, "-X", "faulthandler", str(script), "--threads", str(threads), "--seed", str(seed)]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    environment["ASAN_OPTIONS"] = f"{os.environ.get('ASAN_OPTIONS', '')}:allocator_may_return_null=1"
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(kernels.__file__).parent.parent.parent), str(script.parent)])
    done = subprocess.run(
        [*command, "--seconds", "3", "--log", str(log)], env=environment, capture_output=True, text=True, check=False
    )
    case = f"case {log.read_text().strip()} of seed {seed}" if log.exists() else "before the first case"
    assert done.returncode == 0, f"{case}: code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert int(done.stdout.split()[0]) >= 2 * len(CALLS)  # every op was called
