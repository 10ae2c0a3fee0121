"""Device identification, and its measured ceilings: copy bandwidth and matmul throughput."""

import torch

from bench import rows
from bench.campaign.state import Campaign, peak_tflops


def todo(campaign: Campaign) -> list[str]:
    """Return the outstanding items."""
    return [] if campaign.is_done("device") else ["identify"]


def run(campaign: Campaign) -> None:
    """Measure the device, once."""
    if campaign.is_done("device"):
        return
    with campaign.attempt("device", part="device"):
        small, device = campaign.miniature, campaign.device
        bandwidth = rows.copy_bandwidth(device, 2**20 if small else 2**30)
        side, dtype = (64, torch.float32) if small else (8192, torch.bfloat16)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # zeros would be faster
        timing = rows.measure({"product": lambda: a @ b}, device, rounds=3 if small else 20)["product"]
        found = {
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "product_tflop_per_s": round(2 * side**3 / timing.median_ms / 1e9, 4 if small else 1),
            "product": f"{side}x{side} {str(dtype).removeprefix('torch.')}",
        }
        if device.type == "cuda":
            has = torch.cuda.get_device_properties(device)
            found |= {
                "compute_capability": f"{has.major}.{has.minor}",
                "multiprocessors": has.multi_processor_count,
                "memory_gb": round(has.total_memory / 1e9, 1),
                "cuda": torch.version.cuda,
                "peak_tflops_bf16": peak_tflops(campaign.machine["device"]),
            }
        campaign.store("device", {"part": "device"}, "ceilings", found)
        campaign.say("  " + ", ".join(f"{name} {value}" for name, value in found.items()))
