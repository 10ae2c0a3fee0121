"""Published peak rates and memory of GPUs, by name."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Published peak rates of a GPU, without sparsity.

    Attributes:
        name: full name.
        bf16: FLOP/s of matmuls in bf16 and fp16.
        tf32: FLOP/s of matmuls in tf32.
        fp32: FLOP/s of matmuls in fp32.
        bandwidth: memory bandwidth in bytes per second.
        memory: memory in bytes.
        source: source of the figures.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: float
    source: str

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s of matmuls in a precision."""
        return {"fp32": self.fp32, "tf32": self.tf32}.get(precision, self.bf16)


# fmt: off
GPUS = {
    "a100": Gpu("A100 SXM 80 GB",   312e12,   156e12, 19.5e12, 2.039e12,  80e9, "NVIDIA A100 datasheet"),
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 494.7e12, 66.9e12,  3.35e12,  80e9, "NVIDIA H100 architecture whitepaper"),
    "h200": Gpu("H200 SXM 141 GB", 989.4e12, 494.7e12, 66.9e12,  4.8e12, 141e9, "NVIDIA H200 datasheet"),
    "b200": Gpu("B200 (HGX)",      2250e12,  1100e12,   80e12,     8e12, 180e9, "NVIDIA Blackwell architecture brief"),
}


# fmt: on
# Slower variants of the same name, MIG slices, and modules with other peak rates.
_OTHERS = ("PCIe", "NVL", "MIG", "GB200", "GH200")


def gpu_named(device: str) -> Gpu | None:
    """Return the peak rates of a device by its driver's name, None if they are not known for certain."""
    if any(other in device for other in _OTHERS):
        return None
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name.upper()}\b", device)), None)
