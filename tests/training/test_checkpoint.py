"""The checkpoints of a run in one process; damaged ones have a test file of their own."""

import json
import shutil
import subprocess
import threading
import time

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from test_train import run, weights
from util import small_net

from fastmask.diffusion import EDM, Denoiser, MaskedDenoising, Objective, RectifiedFlow
from fastmask.diffusion.weights import load_maskdit, save_weights
from fastmask.files import _UMASK
from fastmask.rundir import snapshots
from fastmask.training.checkpoint import Checkpointer, checkpoints, load_checkpoint, load_initial, read_state
from fastmask.training.ema import EMA, PowerEMA
from fastmask.training.optim import OptimConfig, make_optimizer

SHALLOW = {"depth": 1, "decoder_depth": 1}
FILES = [f"{part}.safetensors" for part in ("model", "ema", "optimizer", "profiles")] + ["state.json", "SHA256SUMS"]


class Trained:
    """A network after a few steps, with its averages and optimizer."""

    def __init__(self, steps=2, seed=0, **sizes):
        self.net = small_net(seed=seed, **{**SHALLOW, **sizes})
        self.ema, self.profiles = EMA(self.net, 0.9), [PowerEMA(self.net, width) for width in (0.05, 0.1)]
        self.optimizer = make_optimizer(self.net, OptimConfig(lr=1e-2))
        for _ in range(steps):
            self.step()

    def step(self):
        generator = torch.Generator().manual_seed(0)
        images, sigma = torch.randn(2, 3, 8, 8, generator=generator), torch.ones(2)
        losses = Objective(self.net, [MaskedDenoising()])(images, torch.tensor([0, 3]), None, sigma, images)
        losses["loss"].mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net)
        for decay, profile in zip((0.5, 0.6), self.profiles, strict=True):
            profile.decay = decay
            profile.update(self.net)

    def begin(self, checkpointer, step=1, **more):
        checkpointer.save(step, self.net, self.ema.weights, self.optimizer, {}, self.profiles, **more)

    def save(self, run_dir, step=1, keep=9, **state):
        """Write a checkpoint, wait for it and return its folder."""
        with Checkpointer(run_dir, keep) as checkpointer:
            checkpointer.save(step, self.net, self.ema.weights, self.optimizer, state, self.profiles)
        return run_dir / "checkpoints" / f"step-{step:08d}"

    def load(self, folder):
        return load_checkpoint(folder, self.net, self.ema.weights, self.optimizer, self.profiles)

    def tensors(self):
        """Return copies of the state that a run resumes from, by name."""
        found = {f"net/{name}": tensor for name, tensor in self.net.state_dict().items()}
        found |= {f"ema/{name}": tensor for name, tensor in self.ema.weights.items()}
        for profile in self.profiles:
            found |= {f"{profile.width}/{name}": tensor for name, tensor in profile.weights.items()}
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
    assert state == {"step": 7, "format": 2, "note": [1, "a"]}
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


class Held:
    """Holds the writing thread until a test releases it."""

    def __init__(self, monkeypatch):
        self.go_on = threading.Event()
        save_file = safetensors.torch.save_file

        def held(*args):
            assert self.go_on.wait(60)
            save_file(*args)

        monkeypatch.setattr(safetensors.torch, "save_file", held)


def test_values_are_those_of_the_call(tmp_path, monkeypatch):
    source, other, held = Trained(), Trained(steps=0, seed=1), Held(monkeypatch)
    before, state = source.tensors(), {"note": [1]}
    with Checkpointer(tmp_path, 9) as checkpointer:
        checkpointer.save(1, source.net, source.ema.weights, source.optimizer, state, source.profiles, snapshot=True)
        assert checkpoints(tmp_path) == []
        source.step()
        state["note"].append(2)
        held.go_on.set()
        checkpointer.wait()
        assert other.load(checkpoints(tmp_path)[0])["note"] == [1]
    assert_same(other.tensors(), before)
    for snapshot in snapshots(tmp_path):
        for name, tensor in load_file(snapshot.path).items():
            expected = before.get(f"{snapshot.width}/{name}", before[f"net/{name}"])
            assert torch.equal(tensor, expected.half() if f"{snapshot.width}/{name}" in before else expected)


def test_a_second_call_waits_for_the_first(tmp_path, trained, monkeypatch):
    held = Held(monkeypatch)
    with Checkpointer(tmp_path, 9) as checkpointer:
        trained.begin(checkpointer, 1)
        timer = threading.Timer(0.3, held.go_on.set)
        timer.start()
        started = time.perf_counter()
        trained.begin(checkpointer, 2)
        assert time.perf_counter() - started > 0.2
        assert "step-00000001" in names(tmp_path)
        checkpointer.wait()
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        checkpointer.wait()


def test_snapshots_are_there_before_the_checkpoint(tmp_path, trained, monkeypatch):
    """A run that is killed between them resumes from before them, and writes them then."""
    rename = type(tmp_path).rename
    monkeypatch.setattr(type(tmp_path), "rename", lambda *args: [seen.extend(snapshots(tmp_path)), rename(*args)])
    seen = []
    with Checkpointer(tmp_path, 9) as checkpointer:
        trained.begin(checkpointer, 4, snapshot=True)
    assert [(snapshot.step, snapshot.width) for snapshot in seen] == [(4, 0.05), (4, 0.1)]


def test_snapshots_alone(tmp_path, trained):
    with Checkpointer(tmp_path, 9) as checkpointer:
        checkpointer.save_snapshots(3, trained.net, trained.profiles)
    assert [(snapshot.step, snapshot.width) for snapshot in snapshots(tmp_path)] == [(3, 0.05), (3, 0.1)]
    assert checkpoints(tmp_path) == []
    loaded = load_maskdit(snapshots(tmp_path)[1].path)
    for name, tensor in trained.profiles[1].weights.items():
        assert torch.equal(loaded.get_parameter(name), tensor.half().float())
    assert torch.equal(loaded.model.pos_embed, trained.net.model.pos_embed)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots"]


def begin_on_a_full_disk(run_dir, trained, monkeypatch, then):
    def full(*args):
        raise safetensors.SafetensorError("I/O error: No space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with Checkpointer(run_dir, 9) as checkpointer:
        trained.begin(checkpointer, 1)
        then(checkpointer)


def another_error(_):
    raise ValueError("the loss")


@pytest.mark.parametrize("surfaces", ["wait", "save", "save_snapshots", "end", "end after another"])
def test_an_error_of_the_thread_is_raised_by_what_comes_next(tmp_path, trained, monkeypatch, surfaces):
    reached = []
    then = {
        "wait": lambda c: [c.wait(), reached.append(1)],
        "save": lambda c: [trained.begin(c, 2), reached.append(1)],
        "save_snapshots": lambda c: [c.save_snapshots(2, trained.net, trained.profiles), reached.append(1)],
        "end": lambda c: None,
        "end after another": another_error,
    }[surfaces]
    with pytest.raises(OSError, match="No space left") as error:
        begin_on_a_full_disk(tmp_path, trained, monkeypatch, then)
    assert not reached
    assert ("; before that: the loss" in str(error.value)) == (surfaces == "end after another")
    assert names(tmp_path) == []


def test_a_call_after_an_error_was_raised_writes(tmp_path, trained, monkeypatch):
    with Checkpointer(tmp_path, 9) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            trained.begin(checkpointer, 1)
            with pytest.raises(OSError, match="Input/output error"):
                checkpointer.wait()
        trained.begin(checkpointer, 2)
    assert names(tmp_path) == ["step-00000002"]


def test_what_a_killed_run_left_is_removed(tmp_path, trained):
    (tmp_path / "checkpoints" / ".partial-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".partial-00000009" / "model.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    trained.save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010"]


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
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "format": 2, "config": {"lr": 0.1}}
    assert load_file(folder / "ema.safetensors").keys() == trained.net.state_dict().keys()
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)


def test_others_may_read_what_the_umask_lets_them(tmp_path, trained):
    folder = trained.save(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~_UMASK}


def test_a_checkpoint_that_was_moved_and_linked_back(tmp_path, trained):
    """Its link goes when its time has come, and what it points to stays."""
    elsewhere = tmp_path / "elsewhere"
    folder = trained.save(tmp_path, 1)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    trained.save(tmp_path, 2, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("content", ['{"step": 1, "format": 99}', "[" * 10**5], ids=["later", "deep"])
def test_a_state_that_cannot_be_used(tmp_path, trained, content):
    folder = trained.save(tmp_path)
    (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json (is of format 99, and this version reads 2|cannot be read)"):
        read_state(folder)


def test_starting_from_a_run(tmp_path, trained):
    Trained(steps=0, seed=1).save(tmp_path, 1)
    trained.save(tmp_path, 2)
    other = Trained(steps=0, seed=2)
    load_initial(str(tmp_path), other.net, other.ema.weights)
    ours, theirs = ({k: t for k, t in x.tensors().items() if k.startswith(("net/", "ema/"))} for x in (other, trained))
    assert_same(ours, theirs)


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
    other = Trained(steps=0, depth=2)
    before = other.tensors()
    trained.save(tmp_path / "run")
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for init, message in [
        (
            tmp_path / "absent",
            f"--init {tmp_path}/absent does not exist, and {tmp_path} holds empty, run, weights.pt: name",
        ),
        (tmp_path, f"--init {tmp_path} holds no weights but empty, run, weights.pt: name a run folder, one of its"),
        (tmp_path / "empty", "--init .*/empty holds no checkpoint of a run, but checkpoints: name a run folder, one"),
        (tmp_path / "absent.pt", r"absent\.pt does not exist"),
        (tmp_path / "weights.pt", r"weights\.pt cannot be read as weights"),
        (tmp_path / "run", r"--init .*model\.safetensors is of another network: model\.blocks\.1\S+ is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_initial(str(init), other.net, other.ema.weights)
    assert_same(other.tensors(), before)


def init(source, **sizes):
    """Return what a fresh network and its average become, and what they were."""
    other = Trained(steps=0, seed=2, **sizes)
    before = {name: tensor for name, tensor in other.tensors().items() if name.startswith(("net/", "ema/"))}
    load_initial(str(source), other.net, other.ema.weights)
    return {name: tensor for name, tensor in other.tensors().items() if name in before}, before


def test_starting_from_a_checkpoint_that_is_named(tmp_path, trained):
    folder = trained.save(tmp_path, 1)
    Trained(steps=0, seed=1).save(tmp_path, 2)
    after, _ = init(folder)
    assert_same(after, {name: tensor for name, tensor in trained.tensors().items() if name in after})
    of_file, _ = init(folder / "ema.safetensors")
    for name in trained.ema.weights:
        assert torch.equal(of_file[f"net/{name}"], trained.ema.weights[name])


@pytest.mark.parametrize("part", ["model", "ema"])
def test_starting_from_a_damaged_checkpoint(tmp_path, trained, part, capsys):
    before, folder = trained.save(tmp_path, 1), Trained(steps=0, seed=1).save(tmp_path, 2)
    content = bytearray((folder / f"{part}.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / f"{part}.safetensors").write_bytes(content)
    after, _ = init(tmp_path)
    assert_same(after, {name: tensor for name, tensor in trained.tensors().items() if name in after})
    damage = f"{part}.safetensors differs from its checksum in SHA256SUMS"
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder} is damaged ({damage}): taking {before}", said[1]]
    assert said[1].startswith(f"--init {tmp_path}: took ")
    with pytest.raises(ValueError, match=rf"--init {folder} is damaged \({damage}\): name {tmp_path} for the newest"):
        init(folder)


@pytest.mark.parametrize(
    "sizes", [{"num_classes": 7}, {"input_size": 16}, {"num_classes": 0, "input_size": 4}], ids=str
)
def test_starting_with_other_classes_or_another_size(tmp_path, trained, sizes, capsys):
    folder = trained.save(tmp_path)
    after, before = init(tmp_path, **sizes)
    own, kept = {name for name in before if "embedding_table" in name or "pos_embed" in name}, []
    assert own
    for name, tensor in after.items():
        taken = trained.tensors().get(name)
        is_own = taken is None or taken.shape != tensor.shape
        assert torch.equal(tensor, before[name] if is_own else taken), name
        assert name in own or not is_own
        kept += [name.removeprefix("net/model.")] if is_own and name.startswith("net/") else []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sizes) + 1
    assert all(line.startswith(f"{folder / 'model.safetensors'} is for ") for line in lines[:-1])
    count = sum(name.startswith("net/") for name in after)
    taken = f"took {count - len(kept)} of {count} tensors, not {', '.join(kept)}"
    assert lines[-1] == f"--init {tmp_path}: {taken}"


def test_an_average_of_another_network_starts_nothing(tmp_path, trained):
    """As after a flipped bit in a name, of a checkpoint that has no checksums."""
    folder = trained.save(tmp_path)
    (folder / "SHA256SUMS").unlink()
    (folder / "state.json").write_text('{"step": 1}')
    content = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(content.replace(b"model.mask_token", b"model.mask_tokem"))
    other = Trained(steps=0, seed=2)
    before = other.tensors()
    with pytest.raises(ValueError, match=r"--init .*ema\.safetensors is of another network: .*mask_token is missing"):
        load_initial(str(tmp_path), other.net, other.ema.weights)
    assert_same(other.tensors(), before)


def test_fine_tuning_as_its_users_run_it(tmp_path, capsys):
    """On other classes and a larger size; what starts it is the line that the trainer ended with."""
    flags = ["--data", "synthetic", "--checkpoint-every", "1"]
    run(tmp_path / "a", *flags, "--image-size", "32", "--num-classes", "5", steps=2, unmask=0)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trained 2 steps: "))
    folder = line.removeprefix("trained 2 steps: ")
    more = [*flags, "--image-size", "64", "--num-classes", "3", "--lr", "0", "--init", folder]
    run(tmp_path / "b", *more, steps=1, unmask=0)
    said = capsys.readouterr().out
    model = f"{folder}/model.safetensors is for"
    assert f"{model} 5 classes: the label table for 3 is freshly initialized" in said
    assert f"{model} images of 4 x 4: the position tables for 8 x 8 are recomputed" in said
    before, after = weights(tmp_path / "a"), weights(tmp_path / "b")
    same = {key for key in before if before[key].shape == after[key].shape and torch.equal(before[key], after[key])}
    positions = {"model.pos_embed", "model.decoder_pos_embed"}
    assert before.keys() - same == {*positions, "model.y_embedder.embedding_table.weight"}


def test_equal_checkpoints_are_equal_bytes(tmp_path, trained):
    """In another process too, which draws another order of what has none."""
    folders = [trained.save(tmp_path / name) for name in "abcdef"]
    for path in folders[0].iterdir():
        assert len({(folder / path.name).read_bytes() for folder in folders}) == 1, path.name


@pytest.mark.parametrize("part", ["model", "ema"])
def test_a_checkpoint_of_another_process_is_refused(tmp_path, trained, part):
    """How training times are drawn may have changed, what the weights were trained with may not."""
    folder, file = trained.save(tmp_path), f"{part}.safetensors"
    for process, fits in ((EDM(p_mean=0.0), True), (EDM(sigma_data=1.0), False), (RectifiedFlow(), False)):
        save_weights(folder / file, Denoiser(trained.net.model, process), load_file(folder / file))
        other = Trained(steps=0, seed=3)
        if fits:
            other.load(folder)
            continue
        before = other.tensors()
        with pytest.raises(
            ValueError, match=rf"{file} was written for {type(process).__name__}\(.*, and this run trai"
        ):
            other.load(folder)
        assert_same(other.tensors(), before)
