"""The house rules that a machine can hold."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("fastmask", "tests", "bench") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_every_module_has_its_test():
    modules = (path.relative_to(ROOT / "fastmask") for path in (ROOT / "fastmask").rglob("*.py"))
    public = [path for path in modules if not any(part.startswith("_") for part in path.parts)]
    tests = [path.with_name(f"test_{path.name}") for path in public]
    assert [str(path) for path in tests if not (ROOT / "tests" / path).exists()] == []


def test_kernels_import_torch_the_standard_library_and_each_other_only():
    for path in (ROOT / "fastmask" / "kernels").rglob("*.py"):
        allowed = {"torch", "fastmask", *sys.stdlib_module_names}
        if path.parent.name == "_triton":
            allowed.add("triton")
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path
        assert all(n.startswith("fastmask.kernels") for n in imported(path) if n.startswith("fastmask")), path


def test_a_kernel_file_belongs_to_an_op():
    kernels = {path.stem for path in (ROOT / "fastmask" / "kernels" / "_triton").glob("[!_]*.py")}
    assert kernels
    assert kernels <= {path.stem for path in (ROOT / "fastmask" / "kernels").glob("[!_]*.py")}


def test_nothing_imports_upward():
    """A folder or module may import only from those before it."""
    order = ["console", "files", "fields", "help", "cli", "described", "kernels", "testing", "grid", "ranks", "gpus"]
    order += ["tensorfile", "rundir", "models", "diffusion", "data", "generation", "training", "cost", "evaluation"]
    order += ["exchange", "reporting", "presets"]
    order += ["prepare", "sample", "evaluate", "convert", "report", "train"]
    rank = {name: i for i, name in enumerate(order)}
    for path in (ROOT / "fastmask").rglob("*.py"):
        part = path.relative_to(ROOT / "fastmask").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        used = {name.split(".")[1] for name in imported(path) if name.startswith("fastmask.")} - {part}
        late = {name for name in used if rank[name] > rank[part]}
        assert not late, f"{path.relative_to(ROOT)} imports {late}"


def test_benches_import_one_way():
    order = ["rows", "ops", "report", "baselines", "instruments", "train", "sampling", "data", "campaign", "study"]
    order += ["conftest"]
    rank = {name: i for i, name in enumerate(order)}
    for path in (ROOT / "bench").rglob("*.py"):
        part = path.relative_to(ROOT / "bench").parts[0].removesuffix(".py")
        if part != "__init__":
            used = {name.split(".")[1] for name in imported(path) if name.startswith("bench.")} - {part}
            late = {name for name in used if rank[name] > rank[part]}
            assert not late, f"{path.relative_to(ROOT)} imports {late}"


def test_numbers_of_a_process_stay_in_its_file():
    """But for files of weights of earlier versions, and published ones, which state no process, code for others, and
    presets with a recipe's own."""
    but = ("diffusion/edm.py", "diffusion/weights.py", "exchange/_pipeline.py", "presets.py")
    for path in (ROOT / "fastmask").rglob("*.py"):
        if path.relative_to(ROOT / "fastmask").as_posix() not in but:
            assert not re.search(r"sigma_data|p_mean|p_std", path.read_text()), path
