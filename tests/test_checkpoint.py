"""The checkpoints of a run; reading weights has a test file of its own."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from util import small_net

from fastmask.checkpoint import checkpoints, load_checkpoint, load_initial, save_checkpoint
from fastmask.config import TrainConfig
from fastmask.diffusion import EDMLoss
from fastmask.ema import EMA
from fastmask.optim import make_optimizer

SHALLOW = {"depth": 1, "decoder_depth": 1}


class Trained:
    """A network after a few steps, with its average and optimizer."""

    def __init__(self, steps=2, seed=0, **sizes):
        self.net = small_net(seed=seed, **{**SHALLOW, **sizes})
        self.ema = EMA(self.net, 0.9)
        self.optimizer = make_optimizer(self.net, TrainConfig(lr=1e-2))
        for _ in range(steps):
            self.step()

    def step(self):
        generator = torch.Generator().manual_seed(0)
        images, sigma = torch.randn(2, 3, 8, 8, generator=generator), torch.ones(2)
        EDMLoss()(self.net, images, torch.tensor([0, 3]), sigma=sigma, noise=images).total.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net)

    def save(self, run_dir, step=1, keep=9, **state):
        return save_checkpoint(run_dir, step, self.net, self.ema.weights, self.optimizer, state, keep)

    def load(self, folder):
        return load_checkpoint(folder, self.net, self.ema.weights, self.optimizer)

    def tensors(self):
        """Return copies of all there is to go on with, by name."""
        found = {f"net/{name}": tensor for name, tensor in self.net.state_dict().items()}
        found |= {f"ema/{name}": tensor for name, tensor in self.ema.weights.items()}
        for name, parameter in self.net.named_parameters():
            found |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype


@pytest.fixture(scope="module")
def trained():
    """Not to be changed by a test."""
    return Trained()


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("sizes", [{}, {"decoder_depth": 0}, {"num_classes": 0}], ids=str)
def test_round_trip_is_bit_for_bit(tmp_path, sizes):
    source, other = Trained(**sizes), Trained(steps=0, seed=1, **sizes)
    assert len(source.tensors()) > 90
    state = other.load(source.save(tmp_path, 7, note=[1, "a"]))
    assert state == {"step": 7, "note": [1, "a"]}
    assert_same(other.tensors(), source.tensors())
    for one in (source, other):
        one.step()
    assert_same(other.tensors(), source.tensors())


def test_before_the_first_step(tmp_path):
    source, other = Trained(steps=0), Trained(steps=0, seed=1)
    other.load(source.save(tmp_path, 0))
    assert_same(other.tensors(), source.tensors())


def test_saving_changes_nothing(tmp_path, trained):
    before = trained.tensors()
    trained.save(tmp_path)
    assert_same(trained.tensors(), before)


def test_only_the_newest_are_kept(tmp_path, trained):
    for step in (1, 2, 30, 100):
        trained.save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000100"]
    assert [path.name for path in checkpoints(tmp_path)] == names(tmp_path)
    trained.save(tmp_path, 101, keep=1)
    assert names(tmp_path) == ["step-00000101"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path, trained):
    assert checkpoints(tmp_path) == []
    for name in ("step-00000001-aside", "step-final", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (2, 3):
        trained.save(tmp_path, step, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003"]
    assert names(tmp_path) == ["notes", "step-00000001-aside", "step-00000003", "step-final"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_the_same_step_again_replaces(tmp_path, trained):
    Trained(steps=0, seed=1).save(tmp_path, 5)
    other = Trained(steps=0, seed=2)
    other.load(trained.save(tmp_path, 5))
    assert_same(other.tensors(), trained.tensors())
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), safetensors.SafetensorError("I/O error: No space left")]
)
def test_a_failed_write_leaves_the_earlier_ones(tmp_path, trained, monkeypatch, fails_at, error):
    for step in (1, 2):
        trained.save(tmp_path, step)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save_file, calls = safetensors.torch.save_file, []

    def full(tensors, path, *rest):
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for step in (2, 3):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            trained.save(tmp_path, step, keep=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_a_killed_run_left_is_removed(tmp_path, trained):
    (tmp_path / "checkpoints" / ".partial-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".partial-00000009" / "model.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    trained.save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010"]


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut off", "overwritten"])
def test_a_damaged_part_is_one_line_and_nothing_is_loaded(tmp_path, trained, part, damage):
    folder = trained.save(tmp_path)
    file = folder / f"{part}.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut off": content[:-1], "overwritten": b"\0" * len(content)}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    other = Trained(steps=0, seed=1)
    before = other.tensors()
    with pytest.raises(
        ValueError, match=rf"step-00000001 is damaged \(.*{part}\.safetensors .*\): delete it to"
    ) as error:
        other.load(folder)
    assert "\n" not in str(error.value)
    assert_same(other.tensors(), before)


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_a_damaged_state_is_one_line(tmp_path, trained, content):
    folder = trained.save(tmp_path)
    (folder / "state.json").unlink()
    if content is not None:
        (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"step-00000001 is damaged \(state\.json: .*\): delete it to go on") as error:
        Trained(steps=0).load(folder)
    assert "\n" not in str(error.value)


def test_another_shape_lists_the_names(tmp_path, trained):
    folder = trained.save(tmp_path)
    with pytest.raises(ValueError, match=r"step-00000001 is of another network: ") as error:
        Trained(steps=0, num_classes=7).load(folder)
    message = r"model.y_embedder.embedding_table.weight has shape (16, 5) instead of (16, 7)"
    assert str(error.value).endswith(message)
    with pytest.raises(ValueError, match=r"model\.decoder_blocks\.0\.\S+ is not part of the network.* and \d+ more"):
        Trained(steps=0, decoder_depth=0).load(folder)
    with pytest.raises(ValueError, match=r"model\.blocks\.1\.\S+ is missing"):
        Trained(steps=0, depth=2).load(folder)


def test_an_average_of_another_shape_is_refused(tmp_path, trained):
    folder = trained.save(tmp_path / "a")
    shutil.copy(Trained(steps=0, num_classes=7).save(tmp_path / "b") / "ema.safetensors", folder)
    with pytest.raises(ValueError, match=r"another network: .*embedding_table"):
        Trained(steps=0).load(folder)


def test_files_are_plain(tmp_path, trained):
    folder = trained.save(tmp_path, 3, config={"lr": 0.1})
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "config": {"lr": 0.1}}
    assert load_file(folder / "ema.safetensors").keys() == trained.net.state_dict().keys()


def test_starting_from_a_run(tmp_path, trained):
    Trained(steps=0, seed=1).save(tmp_path, 1)
    trained.save(tmp_path, 2)
    other = Trained(steps=0, seed=2)
    load_initial(str(tmp_path), other.net, other.ema.weights)
    expected = {name: tensor for name, tensor in trained.tensors().items() if name.startswith(("net/", "ema/"))}
    assert_same(other.tensors(), expected)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_starting_from_a_file(tmp_path, trained, name):
    bare = {name.removeprefix("model."): tensor for name, tensor in trained.net.state_dict().items()}
    (torch.save if name.endswith(".pt") else safetensors.torch.save_file)(bare, tmp_path / name)
    other = Trained(steps=0, seed=2)
    load_initial(str(tmp_path / name), other.net, other.ema.weights)
    for key, parameter in trained.net.named_parameters():
        assert torch.equal(other.net.get_parameter(key), parameter)
        assert torch.equal(other.ema.weights[key], parameter)


def test_starting_from_elsewhere(tmp_path, trained):
    other = Trained(steps=0, num_classes=7)
    before = other.tensors()
    trained.save(tmp_path / "run")
    (tmp_path / "weights.pt").write_bytes(b"x")
    for init, message in [
        (tmp_path / "absent", "there is no checkpoint of a run; train one there, or name a weights file"),
        (tmp_path, "there is no checkpoint of a run"),
        (tmp_path / "absent.pt", r"absent\.pt does not exist"),
        (tmp_path / "weights.pt", r"weights\.pt cannot be read as weights"),
        (tmp_path / "run", r"model\.safetensors is of another network: .*embedding_table.* has shape \(16, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_initial(str(init), other.net, other.ema.weights)
    assert_same(other.tensors(), before)
