from fastmask.gpus import GPUS, gpu_named


def test_a_gpu_is_known_by_its_drivers_name():
    for device, name in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200")):
        assert gpu_named(device) == GPUS[name]
    assert gpu_named("NVIDIA GH200 480GB") is gpu_named("NVIDIA GB200") is gpu_named("NVIDIA H100 PCIe") is None
