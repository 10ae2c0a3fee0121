"""The checkpoints of a run whose tensors two processes share, against those of one process."""

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from test_checkpoint import Trained, assert_same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from util import run_ranks

from fastmask.training.checkpoint import Checkpointer, load_initial, newest_good
from fastmask.training.ema import EMA, PowerEMA

PROCESSES = 2


class Sharded(Trained):
    """Another network than `Trained`, whose blocks and then the rest are sharded."""

    def __init__(self):
        super().__init__(steps=0, seed=1)
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for block in (*self.net.model.blocks, *self.net.model.decoder_blocks, self.net.model):
            fully_shard(block, mesh=mesh)
        self.ema, self.profiles = EMA(self.net, 0.9), [PowerEMA(self.net, width) for width in (0.05, 0.1)]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), fused=True)

    def tensors(self):
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in super().tensors().items()}


def content(path):
    """Return what a file holds; safetensors writes what it states of itself in any order."""
    if path.suffix != ".safetensors":
        return path.read_text()
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata(), {name: (t.dtype, t.shape, t.tobytes()) for name, t in tensors.items()}


def go_on(rank, folder):
    """Load what one process saved, and save it again from two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=PROCESSES)
    warned = []
    found = newest_good(folder / "plain", warned.append)
    assert found == folder / "plain" / "checkpoints" / "step-00000003"
    assert len(warned) == (rank == 0)

    plain, sharded = Trained(), Sharded()
    assert isinstance(sharded.ema.weights["model.mask_token"], DTensor)
    assert sharded.load(found)["note"] == "a"
    assert_same(sharded.tensors(), plain.tensors())
    # Of a tensor with one row the second process holds nothing.
    assert sharded.net.model.mask_token.to_local().shape[0] == 1 - rank
    moments = sharded.optimizer.state[sharded.net.model.final_layer.linear.weight]
    assert isinstance(moments["exp_avg"], DTensor)
    assert not isinstance(moments["step"], DTensor)

    with Checkpointer(folder / "sharded", 9) as checkpointer:
        state = {"note": "a"}
        args = (sharded.net, sharded.ema.weights, sharded.optimizer, state, sharded.profiles)
        checkpointer.save(3, *args, snapshot=True)
        for tensor in sharded.ema.weights.values():
            tensor.zero_()
        checkpointer.save_snapshots(4, sharded.net, sharded.profiles)
    # As with DDP every process holds all of it: one writes.
    with Checkpointer(folder / f"of-{rank}", 9) as checkpointer:
        checkpointer.save(3, plain.net, plain.ema.weights, plain.optimizer, state, plain.profiles)
        checkpointer.wait()
    assert (folder / f"of-{rank}").exists() == (rank == 0)

    other = Sharded()
    load_initial(str(folder / "plain" / "weights.safetensors"), other.net, other.ema.weights)
    ours, theirs = other.tensors(), plain.tensors()
    for name in plain.ema.weights:
        assert torch.equal(ours[f"net/{name}"], theirs[f"net/{name}"])
        assert torch.equal(ours[f"ema/{name}"], theirs[f"net/{name}"])

    with pytest.raises(ValueError, match="another network"):
        Sharded().load(folder / "wider" / "checkpoints" / "step-00000001")
    with pytest.raises(ValueError, match=r"is whole: step-00000001 \(state\.json is missing\)"):
        newest_good(folder / "damaged", warned.append)
    dist.destroy_process_group()


def test_two_processes_go_on_from_one_and_the_other_way_round(tmp_path):
    plain = Trained()
    for step in (3, 4):
        folder = plain.save(tmp_path / "plain", step, note="a")
    (folder / "model.safetensors").write_bytes(b"")
    with Checkpointer(tmp_path / "plain", 9) as checkpointer:
        for step in (3, 4):
            checkpointer.save_snapshots(step, plain.net, plain.profiles)
    shutil.copy(folder.with_name("step-00000003") / "model.safetensors", tmp_path / "plain" / "weights.safetensors")
    Trained(steps=0, num_classes=7).save(tmp_path / "wider")
    (plain.save(tmp_path / "damaged") / "state.json").unlink()

    run_ranks(go_on, tmp_path, processes=PROCESSES)

    for kind in ("checkpoints/step-00000003", "snapshots"):
        ours, theirs = (
            {path.name: content(path) for path in (tmp_path / name / kind).iterdir() if path.name != "SHA256SUMS"}
            for name in ("sharded", "plain")
        )
        assert ours == theirs
    other = Trained(steps=0, seed=2)
    other.load(newest_good(tmp_path / "sharded", pytest.fail))
    assert_same(other.tensors(), plain.tensors())
