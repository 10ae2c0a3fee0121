"""What the cost of a run depends on, besides its network and the machine."""

from typing import NamedTuple

from fastmask.cost.work import Memory, memory_of
from fastmask.diffusion import Masking
from fastmask.models.maskdit import MaskDiT
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
    """

    masking: Masking
    max_steps: int
    batch_size: int
    micro_batch: int
    averages: int = 1
    checkpoint_blocks: bool = False
    muon: bool = False

    def memory(self, model: MaskDiT, precision: str) -> Memory:
        """Return the memory at the lowest mask ratio of the run, at which a step takes the most."""
        ratio = self.masking.lowest_ratio(self.max_steps)
        return memory_of(
            model,
            ratio,
            precision,
            averages=self.averages,
            checkpoint_blocks=self.checkpoint_blocks,
            muon=self.muon,
        )


def workload_of(config: TrainConfig) -> Workload:
    """Return what the cost of a run depends on."""
    return Workload(
        config.masking,
        config.max_steps,
        config.batch_size,
        config.micro_batch,
        averages=1 + len(config.ema.ema_widths),
        checkpoint_blocks=config.machine.activation_checkpointing == "block",
        muon=config.optim.optimizer == "muon",
    )
