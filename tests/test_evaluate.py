"""The judge of the digits, against answers that are known."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import small_net

from fastmask.evaluate import main
from fastmask.train import main as train
from fastmask.training.checkpoint import Checkpointer, checkpoints, step_of

SMALL = ["--width", "16", "--depth", "1", "--num-heads", "2", "--decoder-width", "16", "--decoder-depth", "1"]
SMALL += ["--decoder-num-heads", "2", "--batch-size", "8", "--sample-every", "0", "--device", "cpu", "--max-steps", "3"]
SMALL += ["--unmask-steps", "1", "--report-every", "1", "--checkpoint-every", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps and what judging it leaves; not to be changed by a test."""
    run_dir = tmp_path_factory.mktemp("run")
    train(["--run-dir", str(run_dir), *SMALL])
    main([str(run_dir), "--num-steps", "2", "--seed", "1"])
    return run_dir


def test_a_run_gets_its_summary(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary.keys() == {
        *("agreement", "classifier_accuracy", "distance_ratio", "frechet", "frechet_held_out"),
        *("images_per_s", "train_s", "cfg_scale", "num_steps", "step"),
    }
    assert (summary["step"], summary["num_steps"], summary["cfg_scale"]) == (3, 2, 2.0)
    assert 0 <= summary["agreement"] < 0.5  # three steps teach little
    assert summary["frechet"] > summary["frechet_held_out"]
    assert summary["images_per_s"] > 0
    for name in ("digits.png", "loss.png"):
        with Image.open(trained / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] > 500
        assert pixels.std() > 10
    assert not list(trained.glob(".partial*"))


def test_judging_again_gives_the_same(trained, tmp_path, capsys):
    before = (trained / "summary.json").read_text()
    main([str(trained), "--num-steps", "2", "--seed", "1"])
    assert (trained / "summary.json").read_text() == before
    out = capsys.readouterr().out
    assert re.search(r"agreement \d+\.\d% \(the classifier reads 9\d\.\d% of held-out scans\)", out)
    assert [line.split("/")[-1] for line in out.splitlines()[-3:]] == ["summary.json", "digits.png", "loss.png"]


def test_a_damaged_checkpoint_is_passed_over_and_one_that_is_named_is_judged(trained, tmp_path, capsys):
    """The figures are those of the checkpoint that was judged."""
    run_dir = shutil.copytree(trained, tmp_path / "run")
    first, last = checkpoints(run_dir)
    main([str(first), "--num-steps", "2"])
    assert json.loads((run_dir / "summary.json").read_text())["step"] == step_of(first) == 2
    content = bytearray((last / "ema.safetensors").read_bytes())
    content[-3] ^= 1
    (last / "ema.safetensors").write_bytes(content)
    (run_dir / "summary.json").unlink()
    main([str(run_dir), "--num-steps", "2"])
    assert f"{last} is damaged (ema.safetensors differs from its checksum in SHA256SUMS): taking {first}" in (
        capsys.readouterr().out
    )
    assert json.loads((run_dir / "summary.json").read_text())["step"] == 2


def test_figures_after_the_checkpoint_do_not_count(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    line = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    with (run_dir / "stats.jsonl").open("a") as file:
        file.write(json.dumps({**line, "step": 4, "train_s": 1e6}) + "\n" + '{"step": 5, "lo')
    main([str(run_dir), "--num-steps", "2"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["step"] == 3
    assert summary["train_s"] < 1e6
    (run_dir / "stats.jsonl").write_text("")
    with pytest.raises(ValueError, match="reported nothing up to its checkpoint of step 3: train on"):
        main([str(run_dir), "--num-steps", "2"])


@pytest.mark.parametrize("sizes", [{}, {"num_classes": 0}, {"in_channels": 3}, {"input_size": 16}], ids=str)
def test_a_run_on_other_data_is_refused(tmp_path, sizes):
    net = small_net(**{"in_channels": 1, "num_classes": 5 if not sizes else 10, **sizes})
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, net, {}, torch.optim.AdamW(net.parameters()), {})
    with pytest.raises(ValueError, match="was not trained on the digits and their labels"):
        main([str(tmp_path)])
    assert not (tmp_path / "summary.json").exists()


def test_what_is_no_run(trained, tmp_path):
    copied = shutil.copytree(checkpoints(trained)[-1], tmp_path / "copied")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for source, message in [
        (tmp_path, "holds no weights but copied, empty: name a run folder"),
        (tmp_path / "empty", "empty holds no checkpoint of a run, but checkpoints: name a run folder"),
        (tmp_path / "absent", "absent does not exist, and .* holds copied, empty: name a run folder"),
        (copied, "copied is not the folder of a run: name the --run-dir that it was trained with"),
        (checkpoints(trained)[-1] / "ema.safetensors", "is not the folder of a run"),
    ]:
        with pytest.raises(ValueError, match=message):
            main([str(source)])
    with pytest.raises(ValueError, match="did you mean --num-steps"):
        main([str(trained), "--num-step", "2"])
