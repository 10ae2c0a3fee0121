"""Machine: device, precision, compilation, parallelism and memory of a run."""

import dataclasses
from typing import Literal

import torch

from fastmask.console import say
from fastmask.fields import check_at_least, free
from fastmask.ranks import Ranks


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MachineConfig:
    """Device, precision, compilation, parallelism and memory."""

    device: str = free("auto")
    """Device: cuda, cuda:1 or cpu. auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Compute precision of matmuls; weights stay in fp32. auto: bf16 on GPUs that support it, fp16 on others, fp32 on a
    CPU."""
    compile: Literal["auto", "none", "block", "whole"] = free("auto")
    """Scope of torch.compile: each block (faster startup) or the whole network. auto: block on a GPU, none on a CPU."""
    cuda_graphs: Literal["auto", "on", "off"] = free("auto")
    """Replay the step as CUDA graphs, on a single GPU. auto: on where supported."""
    parallel: Literal["ddp", "fsdp2", "fsdp2-grad-op"] = free("ddp")
    """Parallelism under torchrun: replicated weights (DDP), or weights sharded by FSDP2 and gathered per pass, or kept
    gathered from forward to backward (grad-op)."""
    micro_batch_size: int = free(0)
    """Images per forward pass of a process, with gradient accumulation. 0: the process's whole share of the batch."""
    activation_checkpointing: Literal["none", "block"] = free("none")
    """Activation checkpointing: none, or keep only the input of each block and recompute the rest in backward."""

    def check(self, batch_size: int) -> None:
        """Raise a ValueError for the first invalid field, for a global batch size."""
        check_at_least(self, micro_batch_size=0)
        if batch_size % self.micro_batch(batch_size):
            raise ValueError(
                f"batch_size {batch_size} does not divide into parts of micro_batch_size {self.micro_batch_size}"
            )

    def micro_batch(self, batch_size: int) -> int:
        """Return the images per forward pass, for a batch size."""
        return min(self.micro_batch_size or batch_size, batch_size)

    def resolved(self, device: torch.device, ranks: Ranks, batch_size: int) -> "MachineConfig":
        """Return the configuration of this process without "auto" and 0.

        Args:
            device: the device of this process.
            ranks: rank and world size.
            batch_size: global batch size.

        Raises:
            ValueError: this machine cannot do what is asked, or the batch does not divide among the processes.
        """
        share, rest = divmod(batch_size, ranks.count)
        if rest:
            raise ValueError(f"batch_size {batch_size} does not divide among {ranks.count} processes")
        micro = self.micro_batch(share)
        if share % micro:
            raise ValueError(
                f"a process's share of {share} images does not divide into parts of micro_batch_size {micro}"
            )
        return dataclasses.replace(
            self,
            device=str(device),
            precision=self._precision(device),
            micro_batch_size=micro,
            compile=self._compile(device, ranks),
            cuda_graphs=self._cuda_graphs(device, ranks),
        )

    def _precision(self, device: torch.device) -> Literal["fp32", "tf32", "bf16", "fp16"]:
        """Return the precision of matmuls; bf16 and tf32 need hardware support: some GPUs emulate bf16 slowly."""
        if device.type != "cuda":
            return "fp32" if self.precision == "auto" else self.precision
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if self.precision == "auto":
            if not has_bf16:
                say(f"precision fp16, since {torch.cuda.get_device_name(device)} has no bf16")
            return "bf16" if has_bf16 else "fp16"
        if self.precision in ("bf16", "tf32") and not has_bf16:
            raise ValueError(
                f"--precision {self.precision} needs a GPU of compute capability 8.0 or more, which "
                f"{torch.cuda.get_device_name(device)} has not: give fp16 or fp32"
            )
        return self.precision

    def _compile(self, device: torch.device, ranks: Ranks) -> Literal["none", "block", "whole"]:
        if self.compile == "whole" and ranks.count > 1 and self.parallel != "ddp":
            raise ValueError("--compile whole cannot hold the gathering of weights by fsdp2: give --compile block")
        if self.compile == "whole" and self.activation_checkpointing == "block":
            raise ValueError(
                "--activation-checkpointing block recomputes compiled blocks: give --compile block or none"
            )
        if self.compile == "auto":
            return "block" if device.type == "cuda" else "none"
        return self.compile

    def _cuda_graphs(self, device: torch.device, ranks: Ranks) -> Literal["on", "off"]:
        can = device.type == "cuda" and ranks.count == 1
        if self.cuda_graphs == "on" and not can:
            raise ValueError(
                f"--cuda-graphs on works on one GPU, not on {ranks.count} x {device.type}: give auto or off"
            )
        return "on" if can and self.cuda_graphs != "off" else "off"
