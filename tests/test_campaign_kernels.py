"""The kernels' part of the campaign: what it compiles, what it times of a case, and what cannot be captured."""

import pytest
import torch
from fake_gpu import Cuda

from bench.campaign import kernels, table
from bench.campaign.state import Campaign, DeviceLostError
from bench.instruments import graph as _graph
from bench.instruments.graph import Graphed

CPU = torch.device("cpu")
KEY = {"preset": "digits", "file": "masked_loss", "form": "masked", "direction": "forward_backward"}


@pytest.fixture
def campaign(tmp_path):
    return Campaign(CPU, tmp_path / "rows.jsonl")


@pytest.fixture
def compiler(monkeypatch):
    """Return the list of calls of what the compiler made; `wrong` is what it adds to the results."""

    class Calls(list):
        wrong = 0.0

    def compiled(function, device):
        def call(*args, **options):
            calls.append(function)
            out = function(*args, **options)
            return tuple(t + calls.wrong for t in out)

        return call

    calls = Calls()
    monkeypatch.setattr("bench.instruments.cases.compiled", compiled)
    return calls


def measured(campaign):
    return {row["variant"] for row in campaign.find("kernel")}


def test_the_quick_pass_compiles_nothing(campaign, compiler):
    kernels.measure(campaign, KEY, False, 1e9)
    assert measured(campaign) == {"reference", "ours"}
    assert not compiler
    assert not campaign.is_done("kernel", "compiled", **KEY)
    kernels.measure(campaign, KEY, True, 1e9)
    assert measured(campaign) == {"reference", "ours", "compiled"}
    assert compiler


@pytest.mark.parametrize("fails", [False, True])
def test_a_compiled_reference_that_is_wrong_does_not_keep_ours_from_being_timed(campaign, compiler, fails, monkeypatch):
    compiler.wrong = 1.0
    if fails:
        monkeypatch.setattr(compiler, "append", lambda function: 1 / 0, raising=False)
    kernels.measure(campaign, KEY, True, 1e9)
    assert measured(campaign) == {"reference", "ours"}
    (row,) = campaign.find("failure")
    assert (row["variant"], row["case"]) == ("compiled", {"bench_of": "kernel", **KEY})
    assert row["error"].startswith("ZeroDivisionError" if fails else "AssertionError: masked_loss forward_backward")


def test_ours_that_is_wrong_is_not_timed_and_is_tried_again_in_the_next_call(campaign, monkeypatch):
    def made(*where, **options):
        case = make(*where, **options)
        return case._replace(check=lambda name: complain() if name == "ours" else case.check(name))

    def complain():
        raise AssertionError("inaccurate")

    make = kernels.make_case
    monkeypatch.setattr(kernels, "make_case", made)
    kernels.measure(campaign, KEY, False, 1e9)
    assert measured(campaign) == {"reference"}
    assert campaign.is_done("kernel", "ours", **KEY)
    again = Campaign(CPU, campaign.path)
    assert not again.is_done("kernel", "ours", **KEY)
    again.miniature = False
    assert {**KEY, "preset": "xl2-in256", "compiled": False} in list(kernels.wanted(again))


def test_what_cannot_be_captured_is_launched_by_the_next_process(campaign, monkeypatch):
    """The first process ends with the failed capture, and captures nothing of that variant in later calls either."""

    def made(*where, refused, **options):
        case = make(*where, **options)
        calls = {"reference": lambda: (torch.ones(1),), "ours": cuda.reads()}
        graphed = {name: Graphed(call, refused.get(name, "")) for name, call in calls.items()}
        return case._replace(variants=graphed, check=lambda name: graphed[name]())

    make, cuda = kernels.make_case, Cuda(monkeypatch)
    monkeypatch.setattr(kernels, "make_case", made)
    monkeypatch.setattr(_graph, "RECOVERS", False)
    with pytest.raises(DeviceLostError, match=f"masked_loss: no graph could be captured: {cuda.WHY}; "):
        kernels.measure(campaign, KEY, False, 1e9)
    (row,) = campaign.rows
    assert (row["bench"], row["variant"], row["reason"]) == ("uncaptured", "ours", cuda.WHY)
    for run in (campaign.run, None):
        cuda = Cuda(monkeypatch)
        following = Campaign(CPU, campaign.path, run=run)
        kernels.measure(following, KEY, False, 1e9)
        timed = {row["variant"]: row["timed"] for row in following.find("kernel", run=following.run)}
        assert timed == {
            "reference": "graph replay",
            "ours": f"launches, as no graph could be captured: {cuda.WHY}",
        }
        assert cuda.captures == 1
    text = table.render(following.rows)
    assert "| ours, launched |" in text
    assert "| reference |" in text
    assert "Launched: no graph could be captured" in text


def test_what_lost_the_gpu_is_not_tried_again_by_the_next_process(campaign, monkeypatch):
    with campaign.attempt("kernel", "reference", **KEY):
        raise RuntimeError("an illegal memory access was encountered")
    following = Campaign(CPU, campaign.path, run=campaign.run)
    kernels.measure(following, KEY, False, 1e9)
    assert measured(following) == {"ours"}
