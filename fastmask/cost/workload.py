"""What the cost of a run depends on, besides its network and the machine."""

from typing import NamedTuple

from fastmask.cost.work import Memory, memory_of
from fastmask.diffusion import Masking
from fastmask.models.maskdit import MaskDiT
from fastmask.training.align import Aligned
from fastmask.training.config import TrainConfig


class Workload(NamedTuple):
    """What the cost of a run depends on, besides its network and the machine.

    Attributes:
        masking: mask ratios.
        max_steps: number of steps.
        batch_size: global batch size.
        micro_batch: images per forward pass of a process.
        averages: number of EMAs of the weights.
        checkpoint_blocks: whether backward recomputes the blocks.
        muon: whether Muon updates the matrices of the blocks.
        beside: number of parameters that are trained beside the network, without an EMA.
    """

    masking: Masking
    max_steps: int
    batch_size: int
    micro_batch: int
    averages: int = 1
    checkpoint_blocks: bool = False
    muon: bool = False
    beside: int = 0

    def memory(self, model: MaskDiT, precision: str) -> Memory:
        """Return the memory at the lowest mask ratio of the run, at which a step takes the most."""
        ratio = self.masking.lowest_ratio(self.max_steps)
        memory = memory_of(
            model,
            ratio,
            precision,
            averages=self.averages,
            checkpoint_blocks=self.checkpoint_blocks,
            muon=self.muon,
        )
        return memory._replace(
            weights=memory.weights + 4 * self.beside,
            gradients=memory.gradients + 4 * self.beside,
            moments=memory.moments + 8 * self.beside,
        )


def workload_of(config: TrainConfig, aligned: Aligned | None = None) -> Workload:
    """Return what the cost of a run depends on; ``aligned`` is its alignment, None without one."""
    projector = aligned.projector if aligned else None
    return Workload(
        config.masking,
        config.max_steps,
        config.batch_size,
        config.micro_batch,
        averages=1 + len(config.ema.ema_widths),
        checkpoint_blocks=config.machine.activation_checkpointing == "block",
        muon=config.optim.optimizer == "muon",
        beside=sum(p.numel() for p in projector.parameters()) if projector else 0,
    )
