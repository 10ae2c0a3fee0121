"""A training step: noise and mask, forward, backward, gradient clipping, AdamW and EMA.

No host sync. The inputs of a step (samples, their indices, learning rate, decays) and the loss sums live in tensors at
fixed addresses, so that on a GPU the step can be replayed as CUDA graphs.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastmask.data import Dataset
from fastmask.data.loader import Batch
from fastmask.data.teacher import FeatureSource
from fastmask.diffusion import Denoiser, Objective, ObjectiveConfig, TrainingDraws, training_draws
from fastmask.diffusion.alignment import Alignment
from fastmask.diffusion.masking import RatioPerSample
from fastmask.diffusion.objective import TOTAL
from fastmask.models.stack import all_blocks
from fastmask.ranks import Ranks
from fastmask.training.adamw import AdamWEMA
from fastmask.training.ema import EMA
from fastmask.training.graphs import GraphedCalls
from fastmask.training.machine import MachineConfig
from fastmask.training.monitor import Tally, gradient_norm, update_ratio
from fastmask.training.optim import begin_step, clip_gradients
from fastmask.training.parallel import no_sync, replicate

_COMPILES = 64  # recompile limit of a function, a few per kept count; Dynamo raises beyond it
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # autocast dtype by precision


class _Inputs(NamedTuple):
    """What the objective is called with."""

    images: Tensor
    draws: TrainingDraws
    features: tuple[Tensor, ...] = ()


class TrainingStep:
    """A callable that does one optimizer step per call.

    Args:
        net: the denoiser, on its device, already sharded with FSDP2.
        dataset: source of the batches.
        optimizer: optimizer of the parameters of ``net``.
        emas: EMAs updated by each step.
        ranks: rank and world size.
        machine: how the step is computed, resolved.
        objective: terms of the loss, and label dropout.
        per_sample: distribution of the mask ratio per sample in masked steps; None is a constant ratio.
        structured: whether masks keep one position of each group of 2 x 2.
        batch_size: global batch size.
        grad_clip: maximum gradient norm; 0 disables clipping.
        seed: the run's seed.
        alignment: the term that aligns hidden states, on the device and sharded as ``net``; None without one.
        features: source of a teacher's features; None without ``alignment``.
        align_until: step from which on the term is gone; 0 is never.

    Attributes:
        scaler: GradScaler, enabled with fp16.
        tally: loss sums on this rank.
        data_wait_s: seconds that the host has waited for data.
        updating: whether a weight update is in progress; stays set if an error interrupts it.
    """

    def __init__(
        self,
        net: Denoiser,
        dataset: Dataset,
        optimizer: torch.optim.Optimizer,
        emas: Sequence[EMA],
        ranks: Ranks,
        *,
        machine: MachineConfig,
        objective: ObjectiveConfig,
        per_sample: RatioPerSample | None,
        structured: bool = False,
        batch_size: int,
        grad_clip: float,
        seed: int,
        alignment: Alignment | None = None,
        features: FeatureSource | None = None,
        align_until: int = 0,
    ) -> None:
        self._alignment, self._features, self._align_until = alignment, features, align_until
        self._net, self._dataset, self._ranks, self._machine = net, dataset, ranks, machine
        self._optimizer, self._emas = optimizer, emas
        self._per_sample, self._label_drop, self._seed = per_sample, objective.label_drop, seed
        self._structured = structured
        self._batch_size, self._grad_clip = batch_size, grad_clip
        self._device = device = torch.device(machine.device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=machine.precision == "fp16")
        self.data_wait_s = 0.0
        self.updating = False
        self._offset = torch.zeros((), dtype=torch.int64, device=device)
        self._buffers: Batch | None = None
        self._graphs = GraphedCalls(device) if machine.cuda_graphs == "on" else None
        self._keep = 0  # kept patches of the last step
        self._aligns = alignment is not None  # whether it had the term
        self._shards = [net.model, alignment.projector] if alignment else [net.model]

        net.model.checkpoint_blocks = machine.activation_checkpointing == "block"
        terms = objective.terms(net.model.config)
        self._objective = Objective(net, terms if alignment is None else [*terms, alignment])
        self.tally = Tally(device, self._objective.names, self._objective.beside)
        self._compile(machine.compile)
        self._module = replicate(self._objective, machine.parallel, device, ranks)

    def __call__(self, batches: Iterator[Batch], first_sample: int, keep: int, lr: float, step: int) -> None:
        """Do one step: `gradients`, then `update`; the gradients stay available until `finish`."""
        begin_step(self._optimizer, self._emas, lr, step)
        self.gradients(batches, first_sample, keep, step)
        self.update(keep)

    def gradients(self, batches: Iterator[Batch], first_sample: int, keep: int, step: int = 0) -> None:
        """Draw noise, masks and dropout of the condition, and run the forward and backward passes of a step.

        Args:
            batches: this rank's micro-batches.
            first_sample: global index of the step's first sample; all randomness is a function of it and the seed.
            keep: K, the number of patches that the encoder sees; L means no mask.
            step: number of the step, counted from 0, which decides whether hidden states are aligned.
        """
        share, micro_batch = self._batch_size // self._ranks.count, self._machine.micro_batch(self._batch_size)
        self._enter_stage(keep, step)
        for part in range(0, share, micro_batch):
            self._load(batches)
            self._offset.fill_(first_sample + self._ranks.rank * share + part)
            last = part + micro_batch == share
            self._run(("gradients", keep), lambda last=last: self._add_gradients(keep, last))  # type: ignore[misc]

    def update(self, keep: int) -> None:
        """Clip the gradients, and update the weights and EMAs."""
        # Only AdamWEMA without a GradScaler can be captured in a CUDA graph.
        capturable = isinstance(self._optimizer, AdamWEMA) and not self.scaler.is_enabled()
        self.updating = True
        self._run(("update", keep < self._net.model.length) if capturable else None, self._update)
        self.updating = False

    def finish(self) -> None:
        """Reset the gradients for the next step."""
        self._optimizer.zero_grad(set_to_none=self._graphs is None)

    def norms(self) -> dict[str, float]:
        """Return the gradient norm before clipping and the relative update norm; synchronises with the device."""
        scale = 1.0
        if self.scaler.is_enabled() and not self._grad_clip:
            scale = self.scaler.get_scale()
        ratio = update_ratio(self._net, self._optimizer)
        return {"grad_norm": gradient_norm(self._objective) / scale, "update_ratio": ratio}

    def reset(self) -> None:
        """Discard loss sums and CUDA graphs after weights and state were loaded."""
        self.tally = Tally(self._device, self._objective.names, self._objective.beside)
        if self._graphs:
            self._graphs.clear()
        self.finish()

    def _add_gradients(self, keep: int, last: bool) -> None:
        """Accumulate the gradients of a micro-batch, scaled to sum up to the gradient of the global mean loss."""
        assert self._buffers is not None
        inputs = self._draw(self._buffers, keep)
        dtype = DTYPES.get(self._machine.precision)
        with no_sync(self._module, self._shards, not last):
            with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
                losses = self._module(inputs.images, *inputs.draws, *inputs.features)
            self.tally.add(self._offset, losses, self._net.process.log_snr(inputs.draws.t))
            # DDP and FSDP average the gradients over the ranks, hence the factor.
            loss = losses[TOTAL].sum() * (self._ranks.count / self._batch_size)
            self.scaler.scale(loss).backward()

    def _draw(self, batch: Batch, keep: int) -> "_Inputs":
        """Return clean images, their random draws, and a teacher's features of them."""
        stored, condition, *read = batch
        sample = torch.arange(len(stored), device=stored.device) + self._offset
        images = self._dataset.to_images(stored, self._seed, sample)
        draws = training_draws(
            self._net.process,
            images,
            condition,
            length=self._net.model.length,
            keep=keep,
            drop=self._net.model.drop,
            label_drop=self._label_drop,
            drop_path=self._net.model.drop_path,
            path_drop=self._net.model.path_drop,
            structured=self._structured,
            per_sample=self._per_sample,
            seed=self._seed,
            offset=self._offset,
        )
        if self._alignment is None or self._features is None or not self._alignment.active:
            return _Inputs(images, draws)
        features = self._features.targets(images, read[0] if read else None, self._seed, sample)
        return _Inputs(images, draws, (features,))

    def _update(self) -> None:
        if self._grad_clip:
            self.scaler.unscale_(self._optimizer)
            clip_gradients(self._optimizer, self._grad_clip)
        self.scaler.step(self._optimizer)
        self.scaler.update()

    def _load(self, batches: Iterator[Batch]) -> None:
        """Fetch the next micro-batch, already on the device; with CUDA graphs, copy it to their input buffers."""
        since = time.perf_counter()
        batch = next(batches)
        self.data_wait_s += time.perf_counter() - since
        if self._graphs and self._buffers is not None:
            for buffer, tensor in zip(tree_leaves(self._buffers), tree_leaves(batch), strict=True):
                if buffer.shape != tensor.shape:  # copying would repeat it if it can
                    raise ValueError(
                        f"a batch holds a tensor of shape {tuple(tensor.shape)} where those before had "
                        f"{tuple(buffer.shape)}, which CUDA graphs cannot read: give --cuda-graphs off"
                    )
                buffer.copy_(tensor)
        else:
            self._buffers = batch

    def _run(self, key: Hashable | None, call: Callable[[], None]) -> None:
        """Run a call, as a CUDA graph if graphs are enabled and ``key`` is given."""
        if self._graphs and key is not None:
            self._graphs.run(key, call)
        else:
            call()

    def _enter_stage(self, keep: int, step: int) -> None:
        """Prepare for a new number of kept patches, and for steps with or without alignment.

        Drops the graphs of the previous stage, which hold its activations and may hold a gradient of the mask token.
        """
        aligns = self._alignment is not None and (not self._align_until or step < self._align_until)
        if (keep, aligns) == (self._keep, self._aligns):
            return
        if self._graphs:
            self._graphs.clear()
        if aligns != self._aligns:
            self._buffers = None  # batches have features in one of the two stages only
        self._keep, self._aligns = keep, aligns
        model = self._net.model
        changed = self._ask_for_the_projector(aligns)
        if self._ask_for_the_mask_token(keep < model.length or model.path_drop > 0) or changed:
            self._module = replicate(self._objective, self._machine.parallel, self._device, self._ranks)

    def _ask_for_the_projector(self, used: bool) -> bool:
        """Put the alignment into the objective or leave it out, and return whether that changed what is trained."""
        if self._alignment is None or self._alignment.active == used:
            return False
        self._alignment.active = used
        for parameter in self._alignment.parameters():
            parameter.requires_grad_(used)
            parameter.grad = None
        return True

    def _ask_for_the_mask_token(self, used: bool) -> bool:
        """Let the mask token require a gradient in steps that use it: DDP would wait for an unused parameter.

        Returns whether that is a change.
        """
        token = getattr(self._net.model, "mask_token", None)
        if token is None or token.requires_grad == used or hasattr(token, "full_tensor"):
            return False
        token.requires_grad_(used)
        token.grad = None
        return True

    def _compile(self, what: str) -> None:
        """Compile forward passes with fullgraph=True; FSDP's hooks stay outside of the graphs."""
        if what == "none":
            return
        torch._dynamo.config.recompile_limit = max(_COMPILES, torch._dynamo.config.recompile_limit)
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        model = self._net.model
        modules = [self._objective] if what == "whole" else [*all_blocks(model.stacks)]
        for module in modules:
            setattr(module, "forward", torch.compile(module.forward, **options))  # noqa: B010  (a method, to mypy)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled networks eagerly inside the block, for shapes that are not worth a compile."""
    with torch.compiler.set_stance("force_eager"):
        yield
