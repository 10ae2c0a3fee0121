"""A step of training: noise and mask, forward, backward, clipping, AdamW and the averages.

Nothing in it waits for the device. What changes from step to step - samples and their numbers, learning rate, decays,
sums of the losses - lives in tensors that stay where they are, so that on a GPU the step is replayed as CUDA graphs.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.data import Dataset
from fastmask.data.loader import Batch
from fastmask.diffusion import Denoiser, MaskedDenoising, Objective, TrainingDraws, training_draws
from fastmask.diffusion.objective import TOTAL
from fastmask.ranks import Ranks
from fastmask.training.config import TrainConfig
from fastmask.training.ema import EMA
from fastmask.training.graphs import GraphedCalls
from fastmask.training.monitor import Tally, gradient_norm, update_ratio
from fastmask.training.optim import AdamWEMA, begin_step, clip_gradients
from fastmask.training.parallel import no_sync, replicate

_COMPILES = 64  # of one function: a few for each kept count; Dynamo stops with an error beyond
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast, by precision


class TrainingStep:
    """Calls do one optimizer step after another.

    Args:
        net: the denoiser, on its device, and split among the ranks if it is to be.
        dataset: where the batches are from.
        config: the resolved configuration.
        optimizer: over the parameters of ``net``.
        emas: averages that each step moves.
        ranks: the processes that share the batch.

    Attributes:
        scaler: of the gradients with fp16.
        tally: sums of the losses on this rank.
        data_wait_s: seconds that the host has waited for data.
        updating: the weights are being moved; still set where an error interrupted that.
    """

    def __init__(
        self,
        net: Denoiser,
        dataset: Dataset,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        emas: Sequence[EMA],
        ranks: Ranks,
    ) -> None:
        self._net, self._dataset, self._config, self._ranks = net, dataset, config, ranks
        self._optimizer, self._emas = optimizer, emas
        self._device = device = torch.device(config.device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.data_wait_s = 0.0
        self.updating = False
        self._offset = torch.zeros((), dtype=torch.int64, device=device)
        self._per_sample = config.per_sample
        self._buffers: Batch | None = None
        self._graphs = GraphedCalls(device) if config.cuda_graphs == "on" else None
        self._keep = 0  # of the last step

        net.model.checkpoint_blocks = config.activation_checkpointing == "block"
        self._objective = Objective(net, [MaskedDenoising(config.mae_coef)])
        self.tally = Tally(device, self._objective.names)
        self._compile(config.compile)
        self._module = replicate(self._objective, config.parallel, device, ranks)

    def __call__(self, batches: Iterator[Batch], first_sample: int, keep: int, lr: float, step: int) -> None:
        """Do a step: `gradients` and `update`, after which the gradients are there until `finish` is called."""
        begin_step(self._optimizer, self._emas, lr, step)
        self.gradients(batches, first_sample, keep)
        self.update(keep)

    def gradients(self, batches: Iterator[Batch], first_sample: int, keep: int) -> None:
        """Draw noise, labels to drop and masks, and do the forward and backward passes of a step.

        Args:
            batches: this rank's micro-batches.
            first_sample: global index of the step's first sample; all randomness is a function of it and the seed.
            keep: K, how many patches the encoder sees; all of them is training without a mask.
        """
        config, share = self._config, self._config.batch_size // self._ranks.count
        self._enter_stage(keep)
        for part in range(0, share, config.micro_batch):
            self._load(batches)
            self._offset.fill_(first_sample + self._ranks.rank * share + part)
            last = part + config.micro_batch == share
            self._run(("gradients", keep), lambda last=last: self._add_gradients(keep, last))  # type: ignore[misc]

    def update(self, keep: int) -> None:
        """Clip the gradients, and move the weights and their averages."""
        # Another optimizer's step, and a scaled one, is not made to be captured.
        capturable = isinstance(self._optimizer, AdamWEMA) and not self.scaler.is_enabled()
        self.updating = True
        self._run(("update", keep < self._net.model.length) if capturable else None, self._update)
        self.updating = False

    def finish(self) -> None:
        """Drop the gradients, which the next step starts without."""
        self._optimizer.zero_grad(set_to_none=self._graphs is None)

    def norms(self) -> dict[str, float]:
        """Return the norm of the gradients before clipping, and that of the update relative to the weights; waits."""
        scale = 1.0
        if self.scaler.is_enabled() and not self._config.grad_clip:
            scale = self.scaler.get_scale()
        ratio = update_ratio(self._net, self._optimizer)
        return {"grad_norm": gradient_norm(self._net) / scale, "update_ratio": ratio}

    def reset(self) -> None:
        """Forget what was added up and captured: weights and state were loaded."""
        self.tally = Tally(self._device, self._objective.names)
        if self._graphs:
            self._graphs.clear()
        self.finish()

    def _add_gradients(self, keep: int, last: bool) -> None:
        """Add the gradients of a micro-batch, scaled so that the parts of all ranks make up the batch's mean."""
        assert self._buffers is not None
        images, draws = self._draw(*self._buffers, keep)
        dtype = DTYPES.get(self._config.precision)
        with no_sync(self._module, self._net.model, not last):
            with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
                losses = self._module(images, *draws)
            self.tally.add(self._offset, losses, self._net.process.log_snr(draws.t))
            # The ranks' gradients are averaged, not added.
            loss = losses[TOTAL].sum() * (self._ranks.count / self._config.batch_size)
            self.scaler.scale(loss).backward()

    def _draw(self, stored: Tensor, labels: Tensor, keep: int) -> tuple[Tensor, TrainingDraws]:
        """Return clean images and what is drawn for them."""
        config, length = self._config, self._net.model.length
        sample = torch.arange(len(labels), device=labels.device) + self._offset
        images = self._dataset.to_images(stored, config.seed, sample)
        draws = training_draws(
            self._net.process,
            images,
            labels,
            length=length,
            keep=keep,
            num_classes=config.num_classes,
            label_drop=config.label_drop,
            per_sample=self._per_sample,
            seed=config.seed,
            offset=self._offset,
        )
        return images, draws

    def _update(self) -> None:
        if self._config.grad_clip:
            self.scaler.unscale_(self._optimizer)
            clip_gradients(self._optimizer, self._config.grad_clip)
        self.scaler.step(self._optimizer)
        self.scaler.update()

    def _load(self, batches: Iterator[Batch]) -> None:
        """Take the next micro-batch, which is on the device; where graphs read it, always to the same place."""
        since = time.perf_counter()
        batch = next(batches)
        self.data_wait_s += time.perf_counter() - since
        if self._graphs and self._buffers is not None:
            for buffer, tensor in zip(self._buffers, batch, strict=True):
                buffer.copy_(tensor)
        else:
            self._buffers = batch

    def _run(self, key: Hashable | None, call: Callable[[], None]) -> None:
        """Do a call; where graphs are on and there is a key, as a graph."""
        if self._graphs and key is not None:
            self._graphs.run(key, call)
        else:
            call()

    def _enter_stage(self, keep: int) -> None:
        """Prepare for another number of kept patches.

        Graphs of the last stage are dropped first: they hold its activations, and would hold a gradient of the mask
        token where there is none any more.
        """
        if keep == self._keep:
            return
        if self._graphs:
            self._graphs.clear()
        self._keep = keep
        self._ask_for_the_mask_token(keep < self._net.model.length)

    def _ask_for_the_mask_token(self, masked: bool) -> None:
        """Let the mask token have a gradient in masked steps alone: else it has no part, and DDP would wait for it."""
        token = getattr(self._net.model, "mask_token", None)
        if token is None or token.requires_grad == masked or hasattr(token, "full_tensor"):
            return
        token.requires_grad_(masked)
        token.grad = None
        self._module = replicate(self._objective, self._config.parallel, self._device, self._ranks)

    def _compile(self, what: str) -> None:
        """Compile forward passes, without a break; FSDP's hooks stay outside them."""
        if what == "none":
            return
        torch._dynamo.config.recompile_limit = max(_COMPILES, torch._dynamo.config.recompile_limit)
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        model = self._net.model
        modules = [self._objective] if what == "whole" else [block for stack in model.stacks for block in stack.blocks]
        for module in modules:
            setattr(module, "forward", torch.compile(module.forward, **options))  # noqa: B010  (a method, to mypy)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Let compiled networks run as they are written inside the block: for shapes that are not worth a compile."""
    with torch.compiler.set_stance("force_eager"):
        yield
