import gzip
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._C._autograd import DeviceType

import fastmask.kernels
from fastmask.training.profiling import (
    _KINDS,
    _OURS,
    _WINDOW,
    ATTENTION,
    COMMUNICATION,
    DATA,
    GAPS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    Profile,
    _parts_of,
    bound_of,
    profile_steps,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Steps:
    """Steps of a small network, that notes how long each took and has waited for data for a while."""

    def __init__(self, device, width=256, wait=0.0):
        self.net = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), fused=True)
        self.x = torch.randn(512, width, device=device)
        self.flops = 6 * 2 * 512 * width**2 - 2 * 512 * width**2  # the input has no gradient
        self.wait, self.waited, self.took = wait, 0.0, []

    def __call__(self):
        began = time.perf_counter()
        time.sleep(self.wait)
        self.waited += time.perf_counter() - began
        y = self.net(self.x)
        q = y.view(4, -1, 128, 32)
        (y + nn.functional.scaled_dot_product_attention(q, q, q).view(y.shape)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.took.append(time.perf_counter() - began)

    def profile(self, count, run_dir, device=CPU):
        return profile_steps(
            self, count, run_dir, device, data_wait_s=lambda: self.waited, flops_per_step=self.flops, peak_flops=1e12
        )


def operators(run_dir, pattern):
    """Return the seconds that the trace gives operators of a name inside the profiled steps."""
    with gzip.open(run_dir / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    window = next(e for e in events if e.get("name") == _WINDOW and e["ph"] == "X")
    inside = [e for e in events if e["ph"] == "X" and window["ts"] <= e["ts"] < window["ts"] + window["dur"]]
    return sum(e["dur"] for e in inside if re.fullmatch(pattern, e["name"])) * 1e-6


def test_the_parts_make_up_the_step(tmp_path, capsys):
    steps = Steps(CPU)
    found = steps.profile(5, tmp_path)
    assert sum(found.parts.values()) == pytest.approx(found.step_s)
    assert found.step_s == pytest.approx(sum(steps.took[-5:]) / 5, rel=0.05)
    assert all(seconds >= 0 for seconds in found.parts.values())
    for name, pattern in ((PRODUCTS, r"aten::(mm|addmm)"), (ATTENTION, r"aten::_scaled_dot_product\w+_for_cpu\w*")):
        assert found.parts[name] == pytest.approx(operators(tmp_path, pattern) / 5, rel=0.05)
        assert found.parts[name] > 0.01 * found.step_s
    assert found.parts[OPTIMIZER] > 0
    assert found.parts[OTHER] > 0
    out = capsys.readouterr().out
    assert re.search(rf"matmuls .* {found.parts[PRODUCTS] * 1e3:.2f} ", out)
    assert out.splitlines()[-1] == bound_of(found, CPU)


def test_the_trace_is_written_whole(tmp_path):
    Steps(CPU, width=256).profile(1, tmp_path)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace.json.gz"]
    assert operators(tmp_path, "aten::addmm") > 0


def test_ops_of_this_library_have_their_names(tmp_path):
    x, shift, scale = (torch.randn(*shape, requires_grad=True) for shape in ((2, 16, 32), (2, 32), (2, 32)))

    def step():
        fastmask.kernels.modulate_norm(x, shift, scale, impl="fused").sum().backward()

    found = profile_steps(step, 2, tmp_path, CPU, data_wait_s=lambda: 0.0, flops_per_step=0.0)
    # Where it runs interpreted, what it is made of is part of it; natively its launch takes longer.
    assert found.share("fastmask::modulate_norm_fwd", "fastmask::modulate_norm_bwd") > 0.02


def test_slow_data_are_said_to_bound_the_run(tmp_path, capsys):
    found = Steps(CPU, wait=0.2).profile(2, tmp_path)
    assert found.parts[DATA] == pytest.approx(0.2, rel=0.05)
    assert sum(found.parts.values()) == pytest.approx(found.step_s)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"waits for data [6-9]\d%: --num-workers", last)


def test_other_processes_store_nothing(tmp_path, capsys):
    steps = Steps(CPU)
    profile_steps(steps, 1, tmp_path, CPU, data_wait_s=lambda: 0.0, flops_per_step=1.0, rank=1)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_no_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least 1 step to profile, not 0"):
        profile_steps(lambda: None, 0, tmp_path, CPU, data_wait_s=lambda: 0.0, flops_per_step=1.0)


def event(name, start, end, device_type=DeviceType.CUDA, is_user_annotation=False):
    where = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=where, device_type=device_type, is_user_annotation=is_user_annotation, cpu_parent=None
    )


def test_kernels_that_overlap_are_counted_once():
    events = [
        event(_WINDOW, 1000, 2000, DeviceType.CPU, True),
        event(_WINDOW, 1000, 2000, is_user_annotation=True),
        event("aten::mm", 1000, 1900, DeviceType.CPU),  # the host's, which does not count
        event("Optimizer.step#AdamWEMA.step", 1100, 1500, is_user_annotation=True),
        event("nvjet_hsh_128x256", 900, 1100),  # begins before the window
        event("ncclDevKernel_AllReduce", 1050, 1400),  # 200 of it while nothing else runs
        event("Memcpy HtoD (Pinned -> Device)", 1060, 1090),  # hidden
        event("flash_fwd_kernel", 1200, 1300),
        event("_gelu_fwd_kernel", 1250, 1350),  # takes the last 50 of it
        event("elementwise_kernel", 1500, 1600),
    ]
    step_s, parts = _parts_of(events, GPU, 150e-6, 2)
    assert step_s == pytest.approx(500e-6)
    # In microseconds of two steps; 500 are idle, of which the host waited for data in 150.
    expected = {PRODUCTS: 100, ATTENTION: 50, "_gelu_fwd_kernel": 100, OTHER: 100, COMMUNICATION: 150}
    expected |= {DATA: 150, GAPS: 350}
    assert {name: round(seconds * 2e6) for name, seconds in parts.items()} == expected


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (PRODUCTS, "aten::mm aten::addmm aten::bmm aten::baddbmm aten::convolution_backward ampere_sgemm_128x64_tn"),
        (PRODUCTS, "sm90_xmma_gemm_bf16bf16 cutlass_80_tensorop_bf16 nvjet_tst_192x192 cublasLt_splitKreduce_kernel"),
        (ATTENTION, "aten::_scaled_dot_product_flash_attention_for_cpu pytorch_flash::flash_bwd fmha_cutlassF_bf16"),
        (COMMUNICATION, "ncclDevKernel_AllReduce_Sum gloo:all_reduce c10d::allreduce_ nccl:_all_gather_base"),
        (OPTIMIZER, "fastmask::adamw_ema _adamw_ema_kernel Optimizer.step#AdamW.step multi_tensor_apply_kernel"),
        (_OURS, "fastmask::modulate_norm_fwd _masked_loss_bwd_kernel"),
        (DATA, "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
        (None, "aten::add aten::copy_ vectorized_elementwise_kernel triton_poi_fused_add_0 AddmmBackward0 aten::mmx"),
    ],
)
def test_names_tell_kinds(kind, names):
    for name in names.split():
        assert next((kind for kind, pattern in _KINDS if pattern.search(name)), None) == kind, name


def test_every_kernel_of_this_library_is_known():
    folder = Path(fastmask.kernels.__file__).parent / "_triton"
    names = [name for path in folder.glob("*.py") for name in re.findall(r"^def (_\w+_kernel)", path.read_text(), re.M)]
    assert names
    for name in names:
        assert next(kind for kind, pattern in _KINDS if pattern.search(name)) in (_OURS, OPTIMIZER), name


@pytest.mark.parametrize(
    ("device", "parts", "said"),
    [
        (
            GPU,
            {PRODUCTS: 0.6, ATTENTION: 0.11, "_gelu_fwd_kernel": 0.2, GAPS: 0.09},
            "matmuls and attention take 71%: the run is bound by them, at 400.0 of 989 TFLOP/s",
        ),
        (
            GPU,
            {GAPS: 0.5, PRODUCTS: 0.4, DATA: 0.1},
            "waits for data 10%: --num-workers; CPU-bound: the GPU idles 50%: --cuda-graphs on, or --compile block",
        ),
        (
            CPU,
            {PRODUCTS: 0.71, GAPS: 0.2, OPTIMIZER: 0.09},
            "matmuls and attention take 71%: the run is bound by them, at 400.0 of 989 TFLOP/s; Python and "
            "operator overhead take 20%: a larger --micro-batch-size, or --compile block",
        ),
        (GPU, {COMMUNICATION: 0.6, PRODUCTS: 0.4}, "waits for other processes 60%: a larger --batch-size, or --micro"),
        (GPU, {OPTIMIZER: 0.6, PRODUCTS: 0.4}, "the optimizer takes 60%: the run is bound by it"),
        (
            GPU,
            {OTHER: 0.3, "_gelu_fwd_kernel": 0.3, PRODUCTS: 0.4},
            "operators other than matmuls and attention",
        ),
    ],
)
def test_what_bounds_the_run(device, parts, said):
    products = parts.get(PRODUCTS, 0) + parts.get(ATTENTION, 0)
    assert bound_of(Profile(1.0, 1.0, parts, 400e12 * products, 989e12), device).startswith(said)


@pytest.mark.gpu
def test_the_gpu_s_kernels_make_up_its_step(tmp_path):
    pytest.importorskip("rich", reason="the table is printed by rich")
    found = Steps(GPU, width=4096).profile(5, tmp_path, GPU)
    assert sum(found.parts.values()) == pytest.approx(found.step_s)
    assert found.share(PRODUCTS) > 0.3
    assert found.parts[ATTENTION] > 0
    assert found.parts[OPTIMIZER] > 0
