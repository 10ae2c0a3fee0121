"""What may change when a run is resumed, what cannot, and what the trainer says and records of it."""

import json
import re

import numpy as np
import pytest
import torch
from test_train import run, stats, weights

from fastmask.diffusion import EDM, RectifiedFlow
from fastmask.training.checkpoint import checkpoints, read_state
from fastmask.training.config import TrainConfig
from fastmask.training.resume import changes_of

GOOD = TrainConfig()
STORED = json.loads(json.dumps(GOOD.recorded()))
SHAPE = "the checkpoint's weights are of that network"


def test_what_a_resumed_run_may_change():
    """A field's own declaration holds, else its member's; without any, a change is recorded."""
    rules = GOOD.on_resume()
    assert rules.keys() >= STORED.keys()
    assert rules["width"] == {"fixed": SHAPE}  # declared for the network
    assert rules["sigma_data"] == {"fixed": "the checkpoint's weights were trained with it"}
    assert rules["cfg_scale"] == {"free": True}  # declared for the sampling of grids
    assert rules["lr"] == {}
    assert {"recorded": True} == rules["p_mean"] == GOOD.replace(process=RectifiedFlow()).on_resume()["shift"]


def test_free_fields_are_not_recorded():
    assert changes_of(STORED, GOOD, "runs/x") == {}
    changed = GOOD.replace(report_every=7, num_workers=2, sample_every=5, loss_limit=9.0, on_bad="skip")
    assert changes_of(STORED, changed, "runs/x") == {}


def test_the_optimizer_is_free_among_those_of_one_state():
    reason = r"\(AdamW and Muon keep another state in the checkpoint\)"
    muon = {**STORED, "optimizer": "muon"}
    for name in ("adamw_ema", "torch", "apex"):
        assert changes_of({**STORED, "optimizer": name}, GOOD.replace(optimizer="torch"), "runs/x") == {}
        with pytest.raises(ValueError, match=f"cannot be resumed with optimizer {name} -> muon {reason}: give"):
            changes_of({**STORED, "optimizer": name}, GOOD.replace(optimizer="muon"), "runs/x")
        with pytest.raises(ValueError, match=f"cannot be resumed with optimizer muon -> {name} {reason}: give"):
            changes_of(muon, GOOD.replace(optimizer=name), "runs/x")
    assert changes_of(muon, GOOD.replace(optimizer="muon"), "runs/x") == {}


def test_other_fields_are():
    changed = GOOD.replace(lr=0.5, betas=(0.8, 0.9), max_steps=2000, unmask_steps=10)
    assert changes_of(STORED, changed, "runs/x") == {
        "lr": (1e-4, 0.5),
        "betas": ([0.9, 0.999], [0.8, 0.9]),
        "max_steps": (1000, 2000),
        "unmask_steps": (0, 10),
    }


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("width", 128, SHAPE),
        ("num_classes", 9, SHAPE),
        ("seed", 7, "it decides which samples come next"),
        ("data", "other", "the run has been trained on those images"),
        ("ema_widths", [0.1], "these averages began with the run"),
    ],
)
def test_what_cannot_change_says_why(name, value, reason):
    changed = GOOD.replace(lr=0.5, **{name: value})
    message = f"runs/x holds a run that cannot be resumed with {name} {STORED[name]} -> {value} ({reason}): give"
    with pytest.raises(ValueError, match=re.escape(message)):
        changes_of(STORED, changed, "runs/x")


def test_fields_of_the_process():
    """What its weights were trained with cannot change; how its noise is drawn can."""
    with pytest.raises(ValueError, match=r"sigma_data 0\.5 -> 1\.0 \(the checkpoint's weights were trained with it\)"):
        changes_of(STORED, GOOD.replace(process=EDM(sigma_data=1.0)), "runs/x")
    assert changes_of(STORED, GOOD.replace(process=EDM(p_mean=-0.4)), "runs/x") == {"p_mean": (-1.2, -0.4)}


def test_a_field_that_was_renamed():
    earlier = {"mirror" if name == "flip" else name: value for name, value in STORED.items()}
    assert changes_of(earlier, GOOD, "runs/x") == {}
    with pytest.raises(ValueError, match="flip False -> True"):
        changes_of(earlier, GOOD.replace(flip=True), "runs/x")


def test_a_field_of_a_later_version_had_its_default():
    earlier = {name: value for name, value in STORED.items() if name != "loss_limit"}
    assert changes_of(earlier, GOOD, "runs/x") == {}


def recorded(run_dir):
    changes = json.loads((run_dir / "run.json").read_text())["changes"]
    assert changes == read_state(checkpoints(run_dir)[-1])["changes"]
    return [(change["step"], change["field"], change["from"], change["to"]) for change in changes]


def test_changes_are_said_recorded_and_take_effect(tmp_path, capsys):
    flags = ["--report-every", "1", "--warmup-steps", "0", "--unmask-lr", "1e-3"]
    run(tmp_path, *flags, "--lr", "1e-3", steps=4, unmask=0)
    run(tmp_path, *flags, "--lr", "1e-4", "--grad-clip", "1", "--batch-size", "8", steps=6, unmask=0)
    said = capsys.readouterr().out
    assert "changed from step 5 on: lr 0.001 -> 0.0001" in said
    run(tmp_path, *flags, "--lr", "1e-4", "--grad-clip", "1", "--batch-size", "8", steps=8, unmask=1)
    assert [line["lr"] for line in stats(tmp_path)] == [1e-3] * 4 + [1e-4] * 3 + [1e-3]
    assert sorted(recorded(tmp_path)) == [
        (4, "batch_size", 16, 8),
        (4, "grad_clip", 0.0, 1.0),
        (4, "lr", 1e-3, 1e-4),
        (4, "max_steps", 4, 6),
        (6, "max_steps", 6, 8),
        (6, "unmask_steps", 0, 1),
    ]
    # Each sample is seen once: those of the first steps at 16 a step, then at 8.
    assert read_state(checkpoints(tmp_path)[-1])["samples"] == 4 * 16 + 4 * 8


def test_another_precision(tmp_path):
    """A gradient scaler that was off before begins anew."""
    run(tmp_path, "--precision", "bf16", steps=2, unmask=0)
    run(tmp_path, "--precision", "fp16", steps=4, unmask=0)
    run(tmp_path, "--precision", "fp32", steps=6, unmask=0)
    assert [change[:2] for change in recorded(tmp_path) if change[1] == "precision"] == [
        (2, "precision"),
        (4, "precision"),
    ]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_the_data_order_is_that_of_the_samples_whatever_the_batch(tmp_path, monkeypatch):
    seen = []
    real = torch.Tensor.fill_

    def fill(self, value):
        if self.dtype == torch.int64 and not self.ndim and isinstance(value, int):
            seen.append(value)
        return real(self, value)

    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    run(tmp_path, "--batch-size", "16", steps=2, unmask=0)
    run(tmp_path, "--batch-size", "8", steps=5, unmask=0)
    assert seen == [0, 16, 32, 40, 48]


def images_at(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(40) % 3)
    return ["--data", str(path), "--patch-size", "4"]


def test_data_are_told_by_their_content(tmp_path):
    """Moved ones are the same, others at the same place are not."""
    flags = images_at(tmp_path / "a.npz", seed=0)
    run(tmp_path / "run", *flags, steps=2, unmask=0)
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    moved = [*flags[:1], str(tmp_path / "b.npz"), *flags[2:]]
    run(tmp_path / "run", *moved, steps=4, unmask=0)
    assert (2, "data", flags[1], moved[1]) in recorded(tmp_path / "run")
    images_at(tmp_path / "b.npz", seed=1)
    message = f"run holds a run on other images than {moved[1]} has now"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", *moved, steps=6, unmask=0)


def test_data_of_an_earlier_checkpoint_are_told_by_their_path(tmp_path):
    flags = images_at(tmp_path / "a.npz", seed=0)
    run(tmp_path / "run", *flags, steps=2, unmask=0)
    folder = checkpoints(tmp_path / "run")[-1]
    state = read_state(folder)
    del state["format"], state["fingerprint"]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "SHA256SUMS").unlink()
    other = images_at(tmp_path / "b.npz", seed=0)
    with pytest.raises(ValueError, match=r"cannot be resumed with data .*a.npz -> .*b.npz"):
        run(tmp_path / "run", *other, steps=4, unmask=0)


def test_a_changed_network_is_refused_and_nothing_is_touched(tmp_path):
    run(tmp_path)
    before, said = weights(tmp_path), (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match=r"cannot be resumed with depth 1 -> 2 \(the checkpoint's weights are of that"):
        run(tmp_path, "--depth", "2")
    assert (tmp_path / "run.json").read_text() == said
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, before[name]), name


def test_another_run_is_refused_before_its_first_checkpoint_too(tmp_path):
    with pytest.raises(ValueError, match="above --loss-limit"):
        run(tmp_path, "--loss-limit", "1e-9", "--report-every", "1")
    assert not checkpoints(tmp_path)
    with pytest.raises(ValueError, match="cannot be resumed with depth 1 -> 2"):
        run(tmp_path, "--depth", "2")
    run(tmp_path, "--lr", "1e-5")  # nothing was trained yet: nothing to record
    assert recorded(tmp_path) == []


def test_a_mistaken_init_can_be_corrected(tmp_path):
    """Nothing was trained from it."""
    run(tmp_path / "masked")
    with pytest.raises(ValueError, match="absent"):
        run(tmp_path / "b", "--init", str(tmp_path / "absent"))
    run(tmp_path / "b", "--init", str(tmp_path / "masked"))


def test_fewer_steps_than_are_done_change_nothing(tmp_path, capsys):
    run(tmp_path, steps=4, unmask=0)
    said = (tmp_path / "run.json").read_text()
    run(tmp_path, steps=2, unmask=0)
    assert "all 4 steps are done" in capsys.readouterr().out
    assert (tmp_path / "run.json").read_text() == said


def test_a_checkpoint_of_an_earlier_version_counts_what_it_skipped(tmp_path):
    """It stated no number of samples, but how many were skipped."""
    run(tmp_path, steps=2, unmask=0)
    folder = checkpoints(tmp_path)[-1]
    state = read_state(folder)
    del state["format"], state["samples"], state["changes"]
    (folder / "state.json").write_text(json.dumps({**state, "skipped": 32}))
    (folder / "SHA256SUMS").unlink()
    run(tmp_path, steps=3, unmask=0)
    assert read_state(checkpoints(tmp_path)[-1])["samples"] == 3 * 16 + 32
