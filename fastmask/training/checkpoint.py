"""Checkpoints and EMA snapshots: asynchronous atomic writes, verified loading.

A checkpoint is a folder `step-00001000` with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors`,
`profiles.safetensors` if the run has power-function EMAs, `projector.safetensors` if it aligns hidden states,
`state.json`, and `SHA256SUMS` for `sha256sum -c`. It is written under a temporary name and renamed once it is on disk,
so a folder with the final name is complete.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmask.console import say
from fastmask.diffusion import Denoiser
from fastmask.diffusion.foreign import split_kind
from fastmask.diffusion.weights import check_same_shapes, check_stated, save_weights, weights_for
from fastmask.files import apply_umask, atomic_write
from fastmask.ranks import whole
from fastmask.rundir import (
    FORMAT,
    PARTS,
    SUMS,
    checkpoints,
    find_checkpoint,
    find_weights,
    locate,
    newest_whole,
    read_state,
    step_of,
    warn_of_start,
)
from fastmask.rundir import sums as checksums
from fastmask.tensorfile import read_tensors, save_tensors
from fastmask.training.ema import PowerEMA

__all__ = [
    "Checkpointer",
    "checkpoints",
    "load_checkpoint",
    "load_initial",
    "newest_good",
    "read_state",
    "step_of",
]


BEST = "best.safetensors"  # in the run folder


class Checkpointer:
    """Writes the checkpoints and snapshots of a run asynchronously. A context manager.

    A call copies the tensors to the host and returns; a thread writes them. An error of the thread is raised by the
    next call, or at the end of the block, on the rank that writes.

    Under torch.distributed every rank makes the same calls, and rank 0 writes. Sharded tensors (DTensor) are gathered
    one by one, so the files are the same for any world size: no consolidation is needed, and a run can resume with
    another world size.

    Args:
        run_dir: the run folder.
        keep: number of checkpoints to keep.

    Attributes:
        writes: whether this rank writes: rank 0, or another one after rank 0 died.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep, self.writes = run_dir, keep, _rank() == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except OSError as failed:
            if not isinstance(error, Exception):
                raise
            raise OSError(f"{failed}; before that: {error}") from error  # report both errors in one line
        finally:
            self._thread.shutdown()

    def save(
        self,
        step: int,
        net: Denoiser,
        ema: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        profiles: Sequence[PowerEMA] = (),
        *,
        snapshot: bool = False,
        projector: nn.Module | None = None,
    ) -> None:
        """Start writing the checkpoint of a step, with the current values.

        Once it is on disk, all but the newest ``keep`` checkpoints are deleted, and so are checkpoints of later steps:
        they are damaged, since the run resumed from an earlier one.

        Args:
            step: optimizer steps done.
            net: the denoiser.
            ema: EMA weights, by the names of ``net``'s parameters.
            optimizer: the optimizer; its state is stored by parameter name.
            state: JSON values to store with ``step``.
            profiles: power-function EMAs.
            snapshot: also write snapshots of ``profiles``, before the checkpoint.
            projector: what is trained with the network, and no part of it.

        Raises:
            OSError: the previous write failed; checkpoints on disk are untouched.
        """
        self.wait()
        weights = net.state_dict()
        parts = {
            "model": weights,
            "ema": {**weights, **ema},
            "optimizer": _optimizer_tensors(net, projector, optimizer),
        }
        if projector is not None:
            parts["projector"] = projector.state_dict()
        if profiles:
            parts["profiles"] = _averages(profiles)
        host = {part: _to_host(tensors, self.writes) for part, tensors in parts.items()}
        text = json.dumps({"step": step, "format": FORMAT, **state}, indent=2) + "\n"
        widths = [profile.width for profile in profiles]

        def write() -> None:
            if snapshot:
                self._write_snapshots(step, net, host["model"], host.get("profiles", {}), widths)
            self._write_checkpoint(step, net, host, text)

        self._begin(net, write)

    def save_snapshots(self, step: int, net: Denoiser, profiles: Sequence[PowerEMA]) -> None:
        """Start writing `snapshots/step-00001000-0.05.safetensors`, in fp16, with the position tables in fp32.

        Raises:
            OSError: the previous write failed.
        """
        self.wait()
        parameters = dict(net.named_parameters())
        tables = _to_host({name: t for name, t in net.state_dict().items() if name not in parameters}, self.writes)
        averages, widths = _to_host(_averages(profiles), self.writes), [profile.width for profile in profiles]
        self._begin(net, lambda: self._write_snapshots(step, net, tables, averages, widths))

    def save_best(self, step: int, net: Denoiser, ema: Mapping[str, Tensor], distance: float) -> None:
        """Start writing `best.safetensors`, EMA weights that state their step and Frechet distance.

        Raises:
            OSError: the previous write failed.
        """
        self.wait()
        host = _to_host({**net.state_dict(), **ema}, self.writes)
        stated = {"step": str(step), "frechet": repr(distance)}

        def write() -> None:
            with atomic_write(self.run_dir / BEST) as partial:
                save_weights(partial, net, host, stated=stated)
                _flush(partial)

        self._begin(net, write)

    def best(self) -> float:
        """Return the Frechet distance of `best.safetensors`; infinity if there is none, or if it is damaged."""
        try:
            with safe_open(self.run_dir / BEST, "pt") as file:
                return float(file.metadata()["frechet"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return math.inf

    def wait(self) -> None:
        """Wait until the pending write is on disk; ranks that do not write return at once.

        Raises:
            OSError: the write failed; checkpoints on disk are untouched.
        """
        if self._writing is not None:
            wait([self._writing])
            written, self._writing = self._writing, None
            written.result()

    def _begin(self, net: Denoiser, write: Callable[[], None]) -> None:
        device = next(net.parameters()).device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if self.writes:
            self._writing = self._thread.submit(write)

    def _write_checkpoint(
        self, step: int, net: Denoiser, parts: Mapping[str, Mapping[str, Tensor]], state: str
    ) -> None:
        root = self.run_dir / "checkpoints"
        root.mkdir(parents=True, exist_ok=True)
        final, partial = root / f"step-{step:08d}", root / f".partial-{step:08d}"
        for left in root.glob(".partial-*"):  # from a killed run
            shutil.rmtree(left)
        partial.mkdir()
        # Write and fsync everything under the temporary name, then rename.
        try:
            for part, tensors in parts.items():
                file = partial / f"{part}.safetensors"
                if part in ("model", "ema"):
                    save_weights(file, net, tensors, checksum=False)
                else:
                    save_tensors(file, tensors)
            (partial / "state.json").write_text(state)
            (partial / SUMS).write_text("".join(checksums(partial).values()))
            for path in partial.iterdir():
                apply_umask(path)
                _flush(path)
            _flush(partial)
            if final.exists():
                _remove(final)
            partial.rename(final)
            _flush(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        # Delete old checkpoints, and damaged ones of later steps.
        kept = [folder for folder in checkpoints(self.run_dir) if step_of(folder) <= step][-self.keep :]
        for folder in checkpoints(self.run_dir):
            if folder not in kept:
                _remove(folder)

    def _write_snapshots(
        self,
        step: int,
        net: Denoiser,
        tables: Mapping[str, Tensor],
        averages: Mapping[str, Tensor],
        widths: Sequence[float],
    ) -> None:
        for width in widths:
            prefix = f"{width:g}/"
            halves = {key.removeprefix(prefix): t.half() for key, t in averages.items() if key.startswith(prefix)}
            with atomic_write(self.run_dir / "snapshots" / f"step-{step:08d}-{width:g}.safetensors") as partial:
                save_weights(partial, net, {**tables, **halves})
                _flush(partial)


def newest_good(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint of a run that matches its checksums, or None if there is no checkpoint.

    Under torch.distributed rank 0 reads and warns, and broadcasts the result.

    Args:
        run_dir: the run folder.
        warn: called with a line for each newer checkpoint that is damaged.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    found: list[Any] = [None, None]
    if _rank() == 0:
        try:
            found[0] = newest_whole(run_dir, None, warn)
        except ValueError as error:
            found[1] = f"{error}; bring one back from a copy, or delete them to start over"
    if _is_distributed():
        torch.distributed.broadcast_object_list(found)
    newest: Path | None
    newest, damage = found
    if damage:
        raise ValueError(damage)
    return newest


def load_checkpoint(
    folder: Path,
    net: Denoiser,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    profiles: Sequence[PowerEMA] = (),
    projector: nn.Module | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into a network, its EMAs and its optimizer, and return the content of ``state.json``.

    Every rank reads the files; sharded targets (DTensor) receive their shard.

    Args:
        folder: a checkpoint returned by `newest_good`.
        net: the denoiser.
        ema: EMA weights, by the names of ``net``'s parameters.
        optimizer: optimizer of ``net``'s parameters.
        profiles: power-function EMAs.
        projector: what is trained with the network, and no part of it.

    Raises:
        ValueError: an unreadable file, or a checkpoint of another network (lists the differing names) or process;
            nothing was copied.
    """
    state = read_state(folder)
    (weights, stated), (averaged, stated_too), (stored, _) = (read_tensors(folder / f"{p}.safetensors") for p in PARTS)
    kept = read_tensors(folder / "profiles.safetensors")[0] if profiles else {}
    for tensors in (weights, averaged):
        check_same_shapes(net.state_dict(), tensors, str(folder))
    for part, metadata in (("model", stated), ("ema", stated_too)):
        check_stated(metadata, net, str(folder / f"{part}.safetensors"))
    check_same_shapes(_averages(profiles), kept, f"{folder / 'profiles.safetensors'}")
    beside = {} if projector is None else projector.state_dict()
    found = read_tensors(folder / "projector.safetensors")[0] if beside else {}
    check_same_shapes(beside, found, f"{folder / 'projector.safetensors'}")
    _copy(net.state_dict(), weights)
    _copy(beside, found)
    _copy(ema, averaged)
    _copy(_averages(profiles), kept)
    for name, parameter in _trained(net, projector).items():
        prefix = f"{name}/"
        mine = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        if mine:
            # torch's fused AdamW keeps the step count on the device of the parameter.
            optimizer.state[parameter] = {
                key: _part_for(parameter, value) if value.shape == parameter.shape else value.to(parameter.device)
                for key, value in mine.items()
            }
    return state


def load_initial(init: str, net: Denoiser, ema: Mapping[str, Tensor]) -> bool:
    """Load initial weights into a network and its EMA; sharded tensors (DTensor) receive their shard.

    For another number of classes or image size the network keeps its own label or position table, with a printed note.

    Args:
        init: a run folder or a checkpoint, which initialises weights and EMA, or a file of weights for both, with the
            kind of foreign ones in front, as in ``dit:FILE``.
        net: the denoiser.
        ema: EMA weights, by the names of ``net``'s parameters.

    Returns:
        Whether all parameters were loaded, and none kept its random initialisation.

    Raises:
        ValueError: nothing to read, damaged files, or weights of another network (lists the differing names).
    """
    kind, source = split_kind(init)
    try:
        place, names = locate(source), ("model.safetensors", "ema.safetensors")
        if place.file:
            weights, notes = weights_for(net, find_weights(source, True, say), kind)
            average = weights
        else:
            folder = find_checkpoint(place, (*names, "state.json"), say)
            warn_of_start(folder, say)
            (weights, notes), (average, _) = (weights_for(net, folder / name) for name in names)
    except ValueError as error:
        raise ValueError(f"--init {error}") from error
    own = net.state_dict()
    kept = [name.removeprefix("model.") for name in own if name not in weights]
    for note in notes:
        say(note)
    but = f", not {', '.join(kept)}" if kept else ""
    say(f"--init {init}: took {len(weights)} of {len(own)} tensors{but}")
    _copy({name: own[name] for name in weights}, weights)
    _copy({name: ema[name] for name in weights if name in ema}, average)
    return all(name in weights for name, _ in net.named_parameters())


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _trained(net: nn.Module, projector: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the parameters of a network, and those beside it, by name."""
    beside = {} if projector is None else dict(projector.named_parameters(prefix="projector"))
    return {**dict(net.named_parameters()), **beside}


def _optimizer_tensors(
    net: nn.Module, projector: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in _trained(net, projector).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _averages(profiles: Sequence[PowerEMA]) -> dict[str, Tensor]:
    return {f"{p.width:g}/{name}": tensor for p in profiles for name, tensor in p.weights.items()}


def _to_host(tensors: Mapping[str, Tensor], writes: bool) -> dict[str, Tensor]:
    """Return full copies on the host; ranks that do not write only take part in the gather and return nothing.

    Copies from a device are asynchronous and may not be finished.
    """
    host = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if writes:
            copy = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
            host[name] = copy.copy_(full, non_blocking=True)
    return host


@torch.no_grad()
def _copy(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(_part_for(target, values[name]))


def _part_for(target: Tensor, value: Tensor) -> Tensor:
    """Return a copy of a full tensor on the device of a target, sharded like the target."""
    if not hasattr(target, "device_mesh"):
        return value.to(target.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415  (slow to import)

    assert isinstance(target, DTensor)
    # Every rank has read the full tensor, so no communication is needed.
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def _flush(path: Path) -> None:
    """Fsync a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a partial one never has the final name. A link is unlinked."""
    if folder.is_symlink():
        folder.unlink()
        return
    dying = folder.with_name(f".partial-{folder.name}")
    folder.rename(dying)
    shutil.rmtree(dying)
