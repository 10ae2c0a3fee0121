import pytest
from networks import preset_network

from fastmask.cost.predict import ASSUMED, predict_run, step_seconds
from fastmask.cost.work import Memory, Work, work_of
from fastmask.cost.workload import workload_of
from fastmask.gpus import GPUS

MFU = ASSUMED._replace(mfu=0.5)


@pytest.mark.parametrize(
    ("name", "at_half", "goal"),
    [("xl2-in256", 1259, 1219), ("dit-xl2-in256", 695, 673), ("xl2-in512", 294, 285), ("dit-xl2-in512", 157, 152)],
)
def test_known_figures_of_an_h100(name, at_half, goal):
    """6 MAC images/s against 989 TFLOP/s: half of it, and what share the project's goals are."""
    config, model = preset_network(name)
    run = predict_run(workload_of(config), model, GPUS["h100"], "bf16", assumed=MFU)
    assert run.images_per_s == pytest.approx(at_half, abs=1)
    share = goal * work_of(model, config.masking.mask_ratio, "bf16").flops / GPUS["h100"].bf16
    assert share == pytest.approx(0.484, abs=0.002)


def test_the_published_rate_is_a_third_of_an_a100():
    config, model = preset_network("xl2-in256")
    assert 276 * work_of(model, config.masking.mask_ratio, "bf16").flops / GPUS["a100"].bf16 == pytest.approx(
        0.35, abs=0.005
    )


def test_a_step_by_hand():
    gpu = GPUS["h100"]._replace(bf16=100.0, bandwidth=10.0)
    assumed = ASSUMED._replace(products=0.5, bandwidth=0.5, launch_s=0.0)
    work = Work(100.0, 1.0, 5.0, 0.0, 10.0, 5.0, 20.0, launches=3)
    # Four images: 8 s of products, 4 s of other bytes; two parts: 4 s of casts, 1 s to add gradients; 4 s of AdamW.
    assert step_seconds(work, gpu, "bf16", 4, 2, assumed) == pytest.approx(8 + 4 + 4 + 1 + 4)
    slow = work._replace(matmul_bytes=50.0)  # then products take as long as their bytes, 40 s
    assert step_seconds(slow, gpu, "bf16", 4, 2, assumed) == pytest.approx(40 + 4 + 4 + 1 + 4)
    assert step_seconds(work, gpu, "bf16", 4, 2, assumed._replace(launch_s=10.0)) == pytest.approx(60 + 4)
    assert step_seconds(work, gpu, "bf16", 4, 2, assumed._replace(mfu=0.25)) == pytest.approx(16)


def test_a_run_on_several_gpus():
    config, model = preset_network("xl2-in256")
    one, eight = (predict_run(workload_of(config), model, GPUS["h100"], "bf16", gpus, MFU) for gpus in (1, 8))
    assert one.hours == pytest.approx(config.max_steps * config.batch_size / one.images_per_s / 3600)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    assert eight.images_per_s == pytest.approx(8 * one.images_per_s)
    with pytest.raises(ValueError, match="does not divide among 7 GPUs"):
        predict_run(workload_of(config), model, GPUS["h100"], "bf16", 7)
    with pytest.raises(ValueError, match="too little memory for any batch"):
        predict_run(workload_of(config), model, GPUS["h100"]._replace(memory=16e9), "bf16")
    small = predict_run(workload_of(config), model, GPUS["h100"]._replace(memory=20e9), "bf16")
    assert 0 < small.micro_batch < config.micro_batch


def test_a_schedule_is_averaged_over_the_run():
    config, model = preset_network("digits")
    config = config.replace(max_steps=400, unmask_steps=100)
    run = predict_run(workload_of(config), model, GPUS["h100"], "bf16", assumed=MFU)
    flops = 0.75 * work_of(model, 0.5, "bf16").flops + 0.25 * work_of(model, 0.0, "bf16").flops
    assert run.images_per_s == pytest.approx(0.5 * GPUS["h100"].bf16 / flops)


def test_a_better_gpu_is_faster():
    config, model = preset_network("xl2-in256")
    load = workload_of(config)
    rates = [predict_run(load, model, GPUS[name], "bf16").images_per_s for name in ("a100", "h100", "b200")]
    assert rates == sorted(rates)
    assert predict_run(load, model, GPUS["h100"], "tf32").images_per_s < rates[1]


def test_predictions_name_their_assumptions():
    assert str(ASSUMED) == ("assuming 65% of the peak in matmuls, 85% of the bandwidth elsewhere, 5 us per launch")
    assert "50.0% of the peak for whole steps" in str(MFU)
    assert Memory(*range(7)).per_image == 11
    assert all(gpu.peak("fp32") < gpu.peak("tf32") < gpu.peak("bf16") == gpu.peak("fp16") for gpu in GPUS.values())
