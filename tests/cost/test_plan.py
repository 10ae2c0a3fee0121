from util import small_net

from fastmask.cost.plan import print_plan
from fastmask.training.config import TrainConfig


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
