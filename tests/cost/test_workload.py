"""What the cost of a run depends on."""

from networks import preset_network

from fastmask.cost.work import memory_of
from fastmask.cost.workload import Workload, workload_of
from fastmask.diffusion import Masking
from fastmask.training.config import TrainConfig


def test_what_a_configuration_says():
    config = TrainConfig.of(mask_ratio=0.75, max_steps=7, batch_size=64, micro_batch_size=16)
    assert workload_of(config) == Workload(Masking(mask_ratio=0.75), 7, 64, 16)
    more = workload_of(config.replace(ema_widths=(0.05, 0.1), activation_checkpointing="block"))
    assert (more.averages, more.checkpoint_blocks, more.muon) == (3, True, False)
    assert workload_of(config.replace(optimizer="muon")).muon


def test_memory_is_that_of_the_step_that_takes_the_most():
    _, model = preset_network("s2-in256")
    masked, unmasked = (memory_of(model, ratio, "bf16") for ratio in (0.5, 0.0))
    assert Workload(Masking(), 100, 8, 8).memory(model, "bf16") == masked
    assert Workload(Masking(unmask_steps=1), 100, 8, 8).memory(model, "bf16") == unmasked
    options = {"averages": 2, "checkpoint_blocks": True, "muon": True}
    again = Workload(Masking(), 100, 8, 8, **options).memory(model, "bf16")
    assert again == memory_of(model, 0.5, "bf16", **options)
