"""GPUs by name: peaks and memory as their makers state them."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Published peaks of a GPU, without sparsity.

    Attributes:
        name: in full.
        bf16: FLOP/s of matmuls in bf16 and fp16.
        tf32: of those in tf32.
        fp32: of those in fp32.
        bandwidth: bytes per second between it and its memory.
        memory: bytes.
        source: where the figures are from.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: float
    source: str

    def peak(self, precision: str) -> float:
        """Return the FLOP/s of matmuls in a precision."""
        return {"fp32": self.fp32, "tf32": self.tf32}.get(precision, self.bf16)


# fmt: off
GPUS = {
    "a100": Gpu("A100 SXM 80 GB",   312e12,   156e12, 19.5e12, 2.039e12,  80e9, "NVIDIA A100 datasheet"),
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 494.7e12, 66.9e12,  3.35e12,  80e9, "NVIDIA H100 architecture whitepaper"),
    "h200": Gpu("H200 SXM 141 GB", 989.4e12, 494.7e12, 66.9e12,  4.8e12, 141e9, "NVIDIA H200 datasheet"),
    "b200": Gpu("B200 (HGX)",      2250e12,  1100e12,   80e12,     8e12, 180e9, "NVIDIA Blackwell architecture brief"),
}


# fmt: on
# Slower cards of the same names, slices of a card, and modules whose peaks are others.
_OTHERS = ("PCIe", "NVL", "MIG", "GB200", "GH200")


def gpu_named(device: str) -> Gpu | None:
    """Return the peaks of a device by the name that its driver gives, None where they are not known for sure."""
    if any(other in device for other in _OTHERS):
        return None
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name.upper()}\b", device)), None)
