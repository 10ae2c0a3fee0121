"""Accuracy checks: every op forward and backward against float64, the network, and the tests that need a GPU.

No step is timed before the network passes, and no op is tuned that fails.
"""

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.baselines.plain import PlainDiT, PlainLoss
from bench.campaign.state import Campaign, release
from bench.ops import OPS, Op, Shapes, describe, shapes_of
from fastmask.diffusion import EDM, Denoiser, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.objective import TOTAL
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.testing import network_errors_over_bound, network_steps, norm_error_over_bound, op_errors_over_bound
from fastmask.training.config import TrainConfig, build_model

PRESETS_CHECKED = ("xl2-in256", "b2-in256", "s2-in256")
_FAILURES_SAID = 20  # maximum number of printed tests
_BATCH = 8  # a small batch: all programs of a launch do the same work, and float64 is slow
_SMALL = {"batch": 3, "length": 16, "keep": 5, "width": 24, "heads": 3, "decoder_width": 16, "channels": 3, "side": 8}


def judge(op: Op, function: Callable[..., Any]) -> float:
    """Return the worst ratio of error to bound over an op's results and gradients; at most 1 passes.

    The rule is the tests' own, `fastmask.testing`.
    """
    errors = op_errors_over_bound(
        function, op.reference, op.inputs, leaves=op.leaves, in_place=op.in_place, **op.options
    )  # fmt: skip
    return max(errors.values())


def shapes_checked(campaign: Campaign) -> Iterator[tuple[str, Shapes]]:
    """Yield names and shapes: small odd ones first, then the presets' shapes with a small batch.

    Compilation dominates the time, so only the first preset is checked in both precisions.
    """
    device = campaign.device
    if campaign.miniature:  # fp32 only: the interpreter truncates to bfloat16, where a GPU rounds
        yield "small", shapes_of("digits", device)._replace(**_SMALL)
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield "small", shapes_of(PRESETS_CHECKED[0], device, dtype)._replace(**_SMALL)
    for dtype in (torch.bfloat16, torch.float32):
        yield PRESETS_CHECKED[0], shapes_of(PRESETS_CHECKED[0], device, dtype)._replace(batch=_BATCH)
    for preset in PRESETS_CHECKED[1:]:
        yield preset, shapes_of(preset, device)._replace(batch=_BATCH)


def sets(campaign: Campaign) -> Iterator[tuple[dict[str, Any], Shapes]]:
    """Yield the cases and shapes that are not checked yet."""
    for name, shapes in shapes_checked(campaign):
        case = {"of": "ops", "shapes": name, "dtype": str(shapes.dtype).removeprefix("torch.")}
        if not campaign.find("check", **case):
            yield case, shapes


def todo(campaign: Campaign) -> list[str]:
    """Return the outstanding checks."""
    missing = [f"every op, {case['shapes']} shapes, {case['dtype']}" for case, _ in sets(campaign)]
    there = importlib.util.find_spec("pytest") is not None
    return missing + ["pytest -m gpu"] * (there and not campaign.is_done("check", of="pytest"))


def run(campaign: Campaign) -> None:
    """Run the outstanding checks, with the tests after the first half of the shapes, so that both get a start."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    network_is_right(campaign)
    left = list(sets(campaign))
    for case, shapes in left[: len(left) // 2]:
        check_ops(campaign, case, shapes)
    run_tests(campaign)
    for case, shapes in left[len(left) // 2 :]:
        check_ops(campaign, case, shapes)


def check_ops(campaign: Campaign, case: dict[str, Any], shapes: Shapes) -> None:
    """Check every form of every op at these shapes; store one row if all pass, else one per failure.

    Forms that an op does not support by design, such as packed attention in fp32 on a GPU, are skipped.
    """
    errors = {}
    for op in OPS:
        for form, make in describe(op).forms.items():
            if campaign.failed_now("check", **case, op=op, form=form):
                continue  # it failed in the previous process
            with campaign.attempt("check", **{**case, "op": op, "form": form}):
                made = make(shapes)
                function = made.fused if fused_runs(campaign.device) else made.reference
                if isinstance(function, str):
                    campaign.say(f"  {op} {form} is not checked: {function}")
                    continue
                errors[f"{op} {form}"] = judged(judge(made, function))
    if errors and not campaign.failed_now("check", **case):
        campaign.store("check", case, "ours", {"errors_over_allowed": errors})
        campaign.say(f"  {len(errors)} ops right at {case['shapes']} shapes, {case['dtype']}")


def judged(error: float) -> float:
    """Return the ratio of error to bound; an AssertionError if it is above 1."""
    if not error <= 1:
        raise AssertionError(f"the error is {error:.3g} times what is allowed")
    return round(error, 4)


def network_is_right(campaign: Campaign) -> bool:
    """Check loss and gradients of our network, and the loss of the baseline."""
    case = {"of": "network", "op": "network"}
    if not campaign.is_done("check", **case):
        with campaign.attempt("check", **case):
            error = judged(network_error(campaign.device))
            campaign.store("check", case, "ours", {"errors_over_allowed": {"loss and gradients": error}})
    return bool(campaign.find("check", **case))


def network_error(device: torch.device) -> float:
    """Return the worst ratio of error to bound for the digits' network: our loss and gradients, the baseline's loss.

    Computed in fp32 against the reference in float64, by the rule for networks of `fastmask.testing`; the reference in
    fp32 measures the error of the device's matmuls.
    """
    # A block takes seconds in Triton's interpreter.
    config = TrainConfig() if device.type == "cuda" else TrainConfig.of(network=MaskDiTConfig(depth=1, decoder_depth=1))
    torch.manual_seed(0)
    model = build_model(config, 1, 8)
    for parameter in model.parameters():  # zero-initialised layers would hide errors before them
        torch.nn.init.normal_(parameter, std=0.1)
    decoder = config.network.decoder_width, config.network.decoder_depth, config.network.decoder_num_heads
    plain = PlainDiT(8, 2, 1, config.network.width, config.network.depth, config.network.num_heads, 10, *decoder)
    plain.load_state_dict(model.state_dict())
    images, labels = torch.randn(4, 1, 8, 8, device=device) / 2, torch.arange(4, device=device)
    draws = training_draws(EDM(), images, labels, length=16, keep=8, num_classes=10, label_drop=0.1, seed=1, offset=0)

    def loss_and_gradients(impl: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        model.impl = impl
        objective = Objective(Denoiser(model, EDM()), [MaskedDenoising()]).to(device, dtype)
        values, sigma, noise = (tensor.to(dtype) for tensor in (images, draws.t, draws.noise))
        total = objective(values, draws.labels, draws.mask, sigma, noise)[TOTAL]
        names, parameters = zip(*objective.named_parameters(), strict=True)
        return total.detach(), dict(zip(names, torch.autograd.grad(total.sum(), parameters), strict=True))

    exact, gradients = loss_and_gradients("reference", torch.float64)
    eager, by_eager = loss_and_gradients("reference", torch.float32)
    ours, by_ours = loss_and_gradients("fused" if fused_runs(device) else "reference", torch.float32)
    indices = [ids.long() for ids in draws.mask[:2]]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # for its convolution
        noise = draws.noise * draws.t[:, None, None, None]
        loss = PlainLoss(plain).to(device)(images, draws.labels, draws.t, noise, *indices).detach()
    blocks = config.network.depth + config.network.decoder_depth
    forward, both = network_steps(blocks), network_steps(blocks, backward=True)
    errors = network_errors_over_bound(by_ours, gradients, both, eager=by_eager)
    losses = (norm_error_over_bound(found, exact, forward, eager=eager) for found in (ours, loss))
    return max(*losses, *errors.values())


def fused_runs(device: torch.device) -> bool:
    """Return whether our kernels run on a device: on a GPU, or in the interpreter."""
    backends = importlib.import_module("fastmask.kernels").backends()
    return all(row.kernel != "none" for row in backends if row.device == device.type)


def run_tests(campaign: Campaign) -> None:
    """Run the tests that need a GPU in a separate process, if pytest is installed."""
    case = {"of": "pytest"}
    if campaign.is_done("check", **case):
        return
    if importlib.util.find_spec("pytest") is None:
        campaign.say("  pytest is not installed: its tests were not run, the checks above were")
        return
    with campaign.attempt("check", **case):
        release()  # free the memory for the tests
        output = pytest_output(gpu_tests())
        counts = pytest_counts(output)
        for line in re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)[:_FAILURES_SAID]:
            campaign.say(f"  {line[:200]}")
        if counts.get("failed") or counts.get("errors") or not counts:
            raise AssertionError(f"pytest -m gpu: {counts or 'no summary'}")
        campaign.store("check", case, "ours", counts)


def gpu_tests() -> list[str]:
    """Return the test files with tests for a GPU; others cannot always be imported on a bare machine."""
    files = sorted((rows.ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text()]


def pytest_output(files: Sequence[str]) -> str:
    """Return the output of pytest -m gpu on some files.

    A file that fails to import is an error, but does not stop the tests of other files.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *files]
    return subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True, check=False).stdout


def pytest_counts(output: str) -> dict[str, int]:
    """Parse the numbers of passed, failed, ... tests; empty if there is no summary."""
    last = (output.strip().splitlines() or [""])[-1]
    found = re.findall(r"(\d+) (passed|failed|skipped|deselected|errors?)", last)
    return {name.replace("error", "errors").replace("errorss", "errors"): int(count) for count, name in found}
