from util import small_net

from fastmask.cost.plan import print_plan
from fastmask.models.counts import num_parameters
from fastmask.training.config import TrainConfig
from fastmask.training.muon import block_matrices


def test_the_optimizers_state_in_memory(capsys):
    config, model = TrainConfig.of(preset="digits", max_steps=10, batch_size=64), small_net(width=512, depth=8).model
    n, inside = num_parameters(model), sum(p.numel() for p in block_matrices(model.stacks))
    assert inside > n / 2
    for name, said, size in [
        ("auto", "AdamW's two moments, fp32", 8 * n),
        ("muon", "Muon's momentum, AdamW's moments, fp32", 8 * n - 4 * inside),
    ]:
        print_plan(config.replace(optimizer=name), model)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "moments" in line)
        assert said in line
        assert f"{size / 1e9:.2f} GB" in line


def test_the_plan_counts(capsys):
    config = TrainConfig.of(preset="digits", max_steps=10, unmask_steps=5, batch_size=64, mask_ratio=0.5)
    model = small_net().model
    print_plan(config, model)
    out = capsys.readouterr().out
    assert "3 x 8 x 8, 16 patches" in out
    assert "forward, 8 of 16 patches kept" in out
    assert "10 steps x 64" in out
    assert "640" in out
    for name in config.recorded():
        assert f"{name} = " in out
