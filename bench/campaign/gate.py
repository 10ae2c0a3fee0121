"""Accuracy: every op forward and backward against float64, the network, and the tests that need a GPU.

No step is timed before the network is right, and no op is tuned that is wrong.
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
from bench.kernels import OPS, shapes_of
from bench.kernels._cases import Op, Shapes
from fastmask.config import TrainConfig, build_model
from fastmask.diffusion import EDMLoss, EDMPrecond, TrainingObjective, training_draws

PRESETS_CHECKED = ("xl2-in256", "b2-in256", "s2-in256")
_FAILURES_SAID = 20  # tests that are named at most
_BATCH = 8  # images: all programs of a launch do the same, and float64 is slow
_SMALL = {"batch": 3, "length": 16, "keep": 5, "width": 24, "heads": 3, "decoder_width": 16, "channels": 3, "side": 8}


def error_over_allowed(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """Return how much of the allowed error a result has: at most 1 is right, infinity is what no bound admits.

    Allowed are twice the error of PyTorch's own operations of the same dtypes and one rounding, in the largest and in
    the root-mean-square error; `tests/util.py` holds the kernels to the same.
    """
    if actual.dtype != eager.dtype or actual.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return 0.0 if torch.equal(actual, exact) else float("inf")
    error, allowed = actual.double() - exact, eager.double() - exact
    rounding = torch.finfo(actual.dtype).eps / 2
    worst = 0.0
    for size in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
        bound = float(2 * size(allowed) + rounding * size(exact))
        here = float(size(error)) / bound if bound else float(size(error)) * float("inf") if size(error) else 0.0
        worst = max(worst, here if here == here else float("inf"))  # NaN, which was never written
    return worst


def results(op: Op, function: Callable[..., Any], inputs: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return the results of an op, then the gradients of its leaves for these gradients of its results.

    Args:
        op: whose options and leaves these are.
        function: its reference or its fused form.
        inputs: by the name of the argument.
        grads: of the floating results; drawn and added to the list if it is empty.
    """
    tracked = {name: t.detach().requires_grad_() if name in op.leaves else t for name, t in inputs.items()}
    double = any(t.dtype == torch.float64 for t in inputs.values())
    options = {name: torch.float64 if double and name == "out_dtype" else value for name, value in op.options.items()}
    out = function(**tracked, **options)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if not op.leaves:
        return outs
    if not grads:
        grads += [torch.randn_like(o) for o in outs]
    leaves = [tracked[name] for name in op.leaves]
    given = [grad.to(o.dtype) for grad, o in zip(grads, outs, strict=True)]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, given))


def judge(op: Op, function: Callable[..., Any]) -> float:
    """Return the worst error over allowed of a form of an op, of its results and its gradients."""
    grads: list[Tensor] = []
    eager = results(op, op.reference, op.inputs, grads)
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in op.inputs.items()}
    exact = results(op, op.reference, doubled, grads)
    with Poisoned():
        actual = results(op, function, op.inputs, grads)
    return max(error_over_allowed(*three) for three in zip(actual, exact, eager, strict=True))


class Poisoned:
    """A context in which memory that is allocated without values is filled with NaN: what is never written shows."""

    def __enter__(self) -> None:
        self.was_on = torch.are_deterministic_algorithms_enabled()
        self.only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
        self.filled = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *exception: object) -> None:
        torch.use_deterministic_algorithms(self.was_on, warn_only=self.only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = self.filled


def shapes_checked(campaign: Campaign) -> Iterator[tuple[str, Shapes]]:
    """Yield a name and shapes: small and odd ones first, then those of the presets with a small batch.

    Most of the time goes into compiling, so only the first preset is checked in both precisions.
    """
    device = campaign.device
    if campaign.miniature:  # in fp32 alone: the interpreter cuts off what a GPU rounds to bfloat16
        yield "small", shapes_of("digits", device)._replace(**_SMALL)
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield "small", shapes_of(PRESETS_CHECKED[0], device, dtype)._replace(**_SMALL)
    for dtype in (torch.bfloat16, torch.float32):
        yield PRESETS_CHECKED[0], shapes_of(PRESETS_CHECKED[0], device, dtype)._replace(batch=_BATCH)
    for preset in PRESETS_CHECKED[1:]:
        yield preset, shapes_of(preset, device)._replace(batch=_BATCH)


def sets(campaign: Campaign) -> Iterator[tuple[dict[str, Any], Shapes]]:
    """Yield the shapes that are not checked yet, with what a row's case says of them."""
    for name, shapes in shapes_checked(campaign):
        case = {"of": "ops", "shapes": name, "dtype": str(shapes.dtype).removeprefix("torch.")}
        if not campaign.find("check", **case):
            yield case, shapes


def todo(campaign: Campaign) -> list[str]:
    """Return what is not checked yet."""
    missing = [f"every op, {case['shapes']} shapes, {case['dtype']}" for case, _ in sets(campaign)]
    there = importlib.util.find_spec("pytest") is not None
    return missing + ["pytest -m gpu"] * (there and not campaign.is_done("check", of="pytest"))


def run(campaign: Campaign) -> None:
    """Check what is not checked yet; the tests after the first half of the shapes, so that both are begun."""
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
    """Check every form of every op at these shapes; one row if all are right, one for each that is not."""
    errors = {}
    for op in OPS:
        for form, make in module_of(op).FORMS.items():
            if campaign.failed_now("check", **case, op=op, form=form):
                continue  # in the process that this one took over from
            with campaign.attempt("check", **{**case, "op": op, "form": form}):
                made = make(shapes)
                function = made.fused if fused_runs(campaign.device) else made.reference
                errors[f"{op} {form}"] = judged(judge(made, function))
    if errors and not campaign.failed_now("check", **case):
        campaign.store("check", case, "ours", {"errors_over_allowed": errors})
        campaign.say(f"  {len(errors)} ops right at {case['shapes']} shapes, {case['dtype']}")


def judged(error: float) -> float:
    """Return an error over allowed that is allowed; an AssertionError for others."""
    if not error <= 1:
        raise AssertionError(f"the error is {error:.3g} times what is allowed")
    return round(error, 4)


def network_is_right(campaign: Campaign) -> bool:
    """Return whether the loss of a whole network, ours and the plain one's, is right, and the gradients of ours."""
    case = {"of": "network", "op": "network"}
    if not campaign.is_done("check", **case):
        with campaign.attempt("check", **case):
            error = judged(network_error(campaign.device))
            campaign.store("check", case, "ours", {"errors_over_allowed": {"loss and gradients": error}})
    return bool(campaign.find("check", **case))


def network_error(device: torch.device) -> float:
    """Return the worst error over allowed of loss and gradients of the digits' network, ours and the plain one's.

    Against the reference in float64; allowed are 1e-5 of a loss and 1e-3 of a gradient (in the 2-norm), in fp32.
    """
    # Interpreted, a block takes seconds.
    config = TrainConfig() if device.type == "cuda" else TrainConfig(depth=1, decoder_depth=1)
    torch.manual_seed(0)
    model = build_model(config, 1, 8)
    for parameter in model.parameters():  # zeros would hide what goes wrong before them
        torch.nn.init.normal_(parameter, std=0.1)
    decoder = config.decoder_width, config.decoder_depth, config.decoder_num_heads
    plain = PlainDiT(8, 2, 1, config.width, config.depth, config.num_heads, 10, *decoder)
    plain.load_state_dict(model.state_dict())
    images, labels = torch.randn(4, 1, 8, 8, device=device) / 2, torch.arange(4, device=device)
    draws = training_draws(
        images, labels, seed=1, offset=0, num_classes=10, label_drop=0.1, length=16, keep=8, p_mean=-1.2, p_std=1.2
    )
    parts: dict[str, list[Tensor]] = {}
    for name, dtype in (("exact", torch.float64), ("ours", torch.float32)):
        model.impl = "fused" if name == "ours" and fused_runs(device) else "reference"
        objective = TrainingObjective(EDMPrecond(model, 0.5), EDMLoss(0.5)).to(device, dtype)
        values, sigma, noise = (t.to(dtype) for t in (images, draws.sigma, draws.noise))
        total = objective(values, draws.labels, draws.mask, sigma, noise).total
        parts[name] = [total.detach(), *torch.autograd.grad(total.sum(), list(objective.parameters()))]
    indices = [ids.long() for ids in draws.mask[:2]]
    parts["plain"] = [PlainLoss(plain).to(device)(images, draws.labels, draws.sigma, draws.noise, *indices).detach()]
    errors = [
        float((actual.double() - exact).norm() / exact.norm()) / (1e-3 if i else 1e-5)
        for name in ("ours", "plain")
        for i, (actual, exact) in enumerate(zip(parts[name], parts["exact"], strict=False))
    ]
    return max(error if error == error else float("inf") for error in errors)


def fused_runs(device: torch.device) -> bool:
    """Return whether our kernels run on a device: on a GPU, or interpreted."""
    backends = importlib.import_module("fastmask.kernels").backends()
    return all(row.kernel != "none" for row in backends if row.device == device.type)


def module_of(op: str) -> Any:
    """Return the bench file of an op, which describes it."""
    return importlib.import_module(f"bench.kernels.bench_{op}")


def run_tests(campaign: Campaign) -> None:
    """Run the tests that need a GPU in a process of their own, where pytest is there."""
    case = {"of": "pytest"}
    if campaign.is_done("check", **case):
        return
    if importlib.util.find_spec("pytest") is None:
        campaign.say("  pytest is not installed: its tests were not run, the checks above were")
        return
    with campaign.attempt("check", **case):
        release()  # the memory is theirs now
        output = pytest_output(gpu_tests())
        counts = pytest_counts(output)
        for line in re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)[:_FAILURES_SAID]:
            campaign.say(f"  {line[:200]}")
        if counts.get("failed") or counts.get("errors") or not counts:
            raise AssertionError(f"pytest -m gpu: {counts or 'no summary'}")
        campaign.store("check", case, "ours", counts)


def gpu_tests() -> list[str]:
    """Return the test files with tests for a GPU: others might not even import on a bare machine."""
    files = sorted((rows.ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text()]


def pytest_output(files: Sequence[str]) -> str:
    """Return what pytest prints when it runs the tests of a GPU in some files.

    A file that does not import is an error that keeps the tests of no other file from running.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *files]
    return subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True, check=False).stdout


def pytest_counts(output: str) -> dict[str, int]:
    """Return how many tests passed, failed, and so on; empty if pytest did not get so far."""
    last = (output.strip().splitlines() or [""])[-1]
    found = re.findall(r"(\d+) (passed|failed|skipped|deselected|errors?)", last)
    return {name.replace("error", "errors").replace("errorss", "errors"): int(count) for count, name in found}
