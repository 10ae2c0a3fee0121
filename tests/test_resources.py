"""What is read from the machine code of the CUDA C++ kernels."""

import sys

import pytest

from bench import resources

USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function void fastmask::(anonymous namespace)::adamw_ema_kernel<1>(fastmask::(anonymous namespace)::Update):
  REG:58 STACK:0 SHARED:36 LOCAL:0 CONSTANT[2]:184 CONSTANT[0]:4432 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
================
arch = sm_90a
 Function void fastmask::(anonymous namespace)::finish_kernel<float, __nv_bfloat16, 5>(fastmask::Finish<float>):
  REG:255 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:500 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_rows_by_kernel_and_architecture():
    assert list(resources.rows(USAGE)) == [
        (["adamw_ema<1>", "sm_80", "58", "36", "0"], False),
        (["finish<fp32, bf16, 5>", "sm_90a", "255", "0", "24"], True),
    ]


@pytest.mark.parametrize(("usage", "code"), [(USAGE, 1), (USAGE.split("Fatbin")[1], 0)], ids=["spills", "fine"])
def test_a_spill_fails(monkeypatch, tmp_path, usage, code):
    monkeypatch.setattr(resources, "cuobjdump", lambda *_: usage)
    out = tmp_path / "cuda.md"
    monkeypatch.setattr(sys, "argv", ["bench.resources", "library.so", "--out", str(out)])
    assert resources.main() == code
    assert "| adamw_ema<1> | sm_80 | 58 | 36 | 0 |" in out.read_text()


def test_a_library_without_kernels_is_a_mistake(monkeypatch, capsys):
    monkeypatch.setattr(resources, "cuobjdump", lambda *_: "")
    monkeypatch.setattr(sys, "argv", ["bench.resources", "library.so"])
    with pytest.raises(SystemExit):
        resources.main()
    assert "no kernels in library.so" in capsys.readouterr().err
