"""Every kernel as the presets launch it, compiled ahead of time for a GPU that is not here."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.instruments.compile import ARCHITECTURES, Compiled, complaint

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "fastmask" / "kernels" / "_triton"
# What is compiled, and which launchers were called to find it; after the table of `bench.instruments.compile` itself.
LISTING = """
import functools, importlib, inspect, json, pkgutil
from fastmask.kernels import _triton

called = set()

def counted(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)
    return call

for info in pkgutil.iter_modules(_triton.__path__):
    module = importlib.import_module(f"{_triton.__name__}.{info.name}")
    for name, value in list(vars(module).items()):
        if name.startswith("launch") and inspect.isfunction(value):
            setattr(module, name, counted(f"{info.name}.{name}", value))

from bench.instruments import compile as bench
found = list(bench.sources())  # which takes a while: once for both
bench.sources = lambda: iter(found)
code = bench.main()
rows = [(source.kernel.__name__, label) for label, source in found]
print(json.dumps({"rows": rows, "called": sorted(called), "code": code}))
"""


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def listing():
    """All sources, and the table of those that the largest preset's step launches, compiled for one architecture."""
    shared = (
        "l2-in256 (bf16 .*D=512|masked)|s2-in256 bf16 (.*masked|K=128$)|digits bf16 K=16$"  # listed under these first
    )
    done = run("-c", LISTING, "--arch", "90", "--case", f"xl2-in256 bf16|{shared}")
    assert done.returncode == 0, done.stderr[-3000:]
    *table, found = done.stdout.splitlines()
    return json.loads(found) | {"table": "\n".join(table)}


def kernels_and_launchers(sources):
    """Return the jit functions of some modules that no jit function calls, and the functions that launch.

    Args:
        sources: Python by the names of modules.
    """
    jitted, inner, launchers = set(), set(), set()
    for module, text in sources.items():
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                jitted.add(node.name)
                calls = (call for call in ast.walk(node) if isinstance(call, ast.Call))
                inner |= {call.func.id for call in calls if isinstance(call.func, ast.Name)}
            elif node.name.startswith("launch"):
                launchers.add(f"{module}.{node.name}")
    return jitted - inner, launchers


def test_every_kernel_and_launcher_is_listed(listing):
    kernels, launchers = kernels_and_launchers({path.stem: path.read_text() for path in KERNELS.glob("*.py")})
    assert {"_adamw_ema_kernel", "_gather_tokens_kernel"} <= kernels
    assert {"adamw_ema.launch", "gelu_linear.launch_bwd"} <= launchers
    assert kernels == {kernel for kernel, _ in listing["rows"]}
    assert launchers == set(listing["called"])


def test_a_new_kernel_is_found():
    new = "@triton.jit\ndef _part(x): pass\n@triton.jit(do_not_specialize=['x'])\ndef _new(x): _part(x)\n"
    assert kernels_and_launchers({"new": f"{new}def launch_new(): _new[(1,)](0)"}) == ({"_new"}, {"new.launch_new"})


def test_the_committed_table_has_every_launch(listing):
    """After a change of kernels, presets or launches, `make kernels` writes it again."""
    table = (ROOT / "bench" / "results" / "compiled.md").read_text().splitlines()
    rows = [tuple(line.strip("| ").split(" | ")[:3]) for line in table if "_kernel | " in line]
    expected = [(name.strip("_"), case, f"sm_{on}") for name, case in listing["rows"] for on in ARCHITECTURES]
    assert sorted(set(expected) - set(rows)) == []
    assert sorted(set(rows) - set(expected)) == []
    assert len(rows) == len(set(rows)) == len(expected)


def test_the_presets_are_among_the_launches(listing):
    """Those that launch nothing that an earlier one does not launch have no rows."""
    cases = [case.split() for _, case in listing["rows"]]
    assert {case[0] for case in cases} >= {"digits", "s2-in256", "b2-in256", "xl2-in256-unmask", "xl2-in512"}
    words = {word for case in cases for word in case}
    assert {"bf16", "fp32", "tf32", "fp16", "packed", "masked", "update", "recompute", "residual", "rms"} <= words


def test_the_largest_preset_compiles_without_spills_or_narrow_loads(listing):
    """`make kernels` does the same for every case and architecture, and the committed table has them all."""
    assert listing["code"] == 0, listing["table"][-3000:]
    for name in (
        "add_gated_norm_bwd",
        "embed_kept_patches_fwd",
        "restore_tokens_bwd",
        "masked_loss_bwd",
        "sample_mask",
        "adamw_ema",
    ):
        assert f"| {name}" in listing["table"]
    assert "| xl2-in256 bf16 packed D=1152 " in listing["table"]
    assert " 0 wrong" in listing["table"]


def test_what_is_wrong_is_said():
    fine = Compiled(registers=40, shared=0, spilled=0, loads={128: 4, 32: 2})
    assert complaint(fine, scalars=2) == ""
    assert complaint(fine._replace(loads={64: 8}), scalars=None) == ""
    assert complaint(fine._replace(spilled=8), scalars=None) == "spills 8 bytes"
    assert "narrow" in complaint(fine._replace(loads={128: 4, 32: 3}), scalars=2)
    assert "narrow" in complaint(fine._replace(loads={64: 8}), scalars=8)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--arch", "70"], {}, "invalid choice"),
        (["--case", "["], {}, "no regular expression"),
        ([], {"TRITON_INTERPRET": "1"}, "unset TRITON_INTERPRET"),
    ],
)
def test_mistakes_get_code_2(arguments, environment, message):
    done = run("-m", "bench.instruments.compile", *arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_case_that_is_not_there_is_refused():
    empty = "import bench.instruments.compile as b; b.sources = lambda: iter(()); b.main()"
    done = run("-c", empty, "--case", "another")
    assert done.returncode == 2
    assert "no case begins with 'another'" in done.stderr
