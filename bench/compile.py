"""`python -m bench.compile`: every Triton kernel as the presets launch it, compiled ahead of time, with no GPU.

The launchers run on tensors without data, and what they would launch is compiled for sm_80, sm_90 and sm_100 instead.
From the machine code come registers, shared memory, spilled bytes and the widths of the loads from global memory. A
spill fails, and so does a kernel that walks over rows with narrower loads than 128 bits, but for its few scalars.
"""

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.launches import LAUNCHES, WIDTHS
from bench.tables import header, line
from fastmask.files import whole_file

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    """A kernel with the arguments that a launcher gave it."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


class Compiled(NamedTuple):
    """What the machine code of a launch says of itself; loads counts instructions by bits per thread."""

    registers: int
    shared: int
    spilled: int
    loads: dict[int, int]


def recorded(call: Any) -> list[Launch]:
    """Return what a call would launch."""
    launches = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options, grid))

    original, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile a launch for an architecture as Triton would at its first call, with aligned pointers."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={**launch.options, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = cuobjdump("--dump-resource-usage", file.name)
        code = cuobjdump("--dump-sass", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    loads: collections.Counter[int] = collections.Counter()
    for modifiers in re.findall(r"\bLDG\.E(\S*)", code):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", modifiers)
        loads[int(bits[1]) if bits else 32] += 1
    return Compiled(registers, made.metadata.shared, stack + local, dict(loads))


def complaint(made: Compiled, wide: bool, scalars: int) -> str:
    """Return what is wrong with a compiled kernel, empty if nothing is."""
    if made.spilled:
        return f"spills {made.spilled} bytes"
    narrow = sum(count for bits, count in made.loads.items() if bits < 128)
    if wide and (not made.loads.get(128) or narrow > scalars):
        return f"{narrow} narrow loads, {scalars} expected"
    return ""


def rows(widths: list[int], architectures: list[int]) -> Iterator[tuple[list[str], str]]:
    """Yield a table row for each distinct kernel, setting and architecture, and what is wrong with it."""
    seen = set()
    for spec in LAUNCHES:
        for label, call in spec.cases(widths):
            for launch in recorded(call):
                for architecture in architectures:
                    name = launch.kernel.__name__
                    key = (name, label, architecture)
                    if key in seen:
                        continue
                    seen.add(key)
                    made = compile_launch(launch, architecture)
                    wide, scalars = spec.wide.get(name, (False, 0))
                    wrong = complaint(made, wide, scalars)
                    loads = " ".join(f"{count}x{bits}" for bits, count in sorted(made.loads.items(), reverse=True))
                    warps = str(launch.options.get("num_warps", 4))
                    yield (
                        [
                            name.strip("_"),
                            label,
                            f"sm_{architecture}",
                            warps,
                            str(made.registers),
                            str(made.shared),
                            str(made.spilled),
                            loads,
                            wrong,
                        ],
                        wrong,
                    )


def main() -> int:
    """Compile, print the table, and return 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--width", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--out", type=Path, help="also write the table here, as Markdown")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    columns = ["kernel", "case", "arch", "warps", "registers", "shared", "spilled", "loads x bits", "wrong"]
    lines = header(columns)
    failed = 0
    sys.stdout.write("\n".join(lines) + "\n")
    for row, wrong in rows(options.width, options.arch):
        failed += bool(wrong)
        lines.append(line(row))
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(lines) - 2} kernels compiled, {failed} wrong\n")
    if options.out:
        head = f"Compiled with triton {triton.__version__} by `python -m bench.compile`; no GPU was used.\n\n"
        with whole_file(options.out) as partial:
            partial.write_text(head + "\n".join(lines) + "\n")
    return 1 if failed else 0


def cuobjdump(option: str, file: str) -> str:
    """Return what NVIDIA's cuobjdump, which is in triton's package, prints of a file."""
    return subprocess.run([_CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
