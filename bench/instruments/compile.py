"""`python -m bench.instruments.compile`: compiles every Triton kernel ahead of time, without a GPU.

As the presets' steps launch it, and as other networks do, by the ops' descriptions. The launchers run on tensors
without data, and their launches are compiled for sm_80, sm_90 and sm_100 instead. The
machine code shows registers, shared memory, spilled bytes and the widths of global loads. A spill is an error, and so
is a row kernel with loads narrower than 128 bits, except for its few scalars.
"""

import argparse
import collections
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.instruments.calls import calls_of
from bench.instruments.preset_launches import preset_cases, with_precision
from bench.ops import OPS, WIDTHS, describe
from bench.report.tables import header, line, write_table

ARCHITECTURES = (80, 90, 100)
_WARP_ROW = 129  # shorter rows do not fill a warp's 128-bit loads
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
    """A kernel launch with its arguments."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


class Compiled(NamedTuple):
    """Statistics of the machine code of a launch; ``loads`` counts instructions by bits per thread."""

    registers: int
    shared: int
    spilled: int
    loads: dict[int, int]


def recorded(call: Any) -> list[Launch]:
    """Return the launches of a call, without executing them."""
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


class Source(NamedTuple):
    """The arguments of `ASTSource` for a launch: types, constants and attributes of values."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]

    def key(self) -> tuple[str, str]:
        """Return a key that is equal for launches with the same machine code."""
        return self.kernel.__name__, repr(self[1:])

    def named_constants(self) -> dict[str, Any]:
        """Return the constants by parameter name."""
        names = list(self.signature)
        return {names[place[0]]: value for place, value in self.constants.items()}

    def traits(self, label: str) -> Iterator[str]:
        """Yield additions to a label: the width, and the enabled forms of the kernel."""
        constants, words = self.named_constants(), label.split()
        if "D" in constants and not any(word.startswith("D=") for word in words):
            yield f"D={constants['D']}"
        for name, value in constants.items():
            if value is True and name.lower() not in words:
                yield name.lower()

    def scalars(self) -> int | None:
        """Return the allowed number of loads narrower than 128 bits; None: any number."""
        constants, allowed = self.named_constants(), _narrow().get(self.kernel.__name__)
        if allowed is None or constants.get("D", _WARP_ROW) < _WARP_ROW:
            return None
        return allowed + 2 * (constants.get("PACKED") is True)  # where a sample begins and ends


def source_of(launch: Launch) -> Source:
    """Return the source that Triton would compile at the first call of a launch, with aligned pointers."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return Source(launch.kernel, signature, constants, attributes, launch.options)


def compile_source(source: Source, architecture: int) -> Compiled:
    """Compile for an architecture, and parse the machine code."""
    made = triton.compile(
        ASTSource(*source[:4]),
        target=GPUTarget("cuda", architecture, 32),
        options={**source.options, "enable_fp_fusion": True},
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


def complaint(made: Compiled, scalars: int | None) -> str:
    """Return the error of a compiled kernel, empty if there is none.

    Args:
        made: the compiled kernel.
        scalars: allowed number of loads narrower than 128 bits; None: any number.
    """
    if made.spilled:
        return f"spills {made.spilled} bytes"
    narrow = sum(count for bits, count in made.loads.items() if bits < 128)
    if scalars is not None and (not made.loads.get(128) or narrow > scalars):
        return f"{narrow} narrow loads, {scalars} expected"
    return ""


@functools.cache
def _narrow() -> dict[str, int]:
    """The allowed numbers of narrow loads of all ops, by kernel."""
    return {kernel: count for op in OPS for kernel, count in describe(op).narrow.items()}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield a label and a launcher call for each launch: of the presets' steps, then those of the descriptions."""
    widths = list(WIDTHS)
    yield from preset_cases(widths)
    for name in OPS:
        for label, op in describe(name).launches(widths):
            for call in itertools.chain(*calls_of(op)):
                yield label, with_precision(call, "fp32")


def sources() -> Iterator[tuple[str, Source]]:
    """Yield each distinct source once, with the label of its case."""
    seen = set()
    for label, call in cases():
        for launch in recorded(call):
            source = source_of(launch)
            if source.key() not in seen:
                seen.add(source.key())
                yield " ".join([label, *source.traits(label)]), source


def rows(cases: str, architectures: list[int]) -> Iterator[tuple[list[str], str]]:
    """Yield a table row and the error for each distinct source and architecture.

    Args:
        cases: regular expression that matches the beginning of the labels to compile.
        architectures: a subset of `ARCHITECTURES`.
    """
    for label, source in sources():
        if not re.match(cases, label):
            continue
        name = source.kernel.__name__.strip("_")
        for architecture in architectures:
            made = compile_source(source, architecture)
            wrong = complaint(made, source.scalars())
            loads = " ".join(f"{count}x{bits}" for bits, count in sorted(made.loads.items(), reverse=True))
            numbers = (source.options.get("num_warps", 4), made.registers, made.shared, made.spilled)
            yield [name, label, f"sm_{architecture}", *map(str, numbers), loads, wrong], wrong


def main() -> int:
    """Compile and print the table; return 1 if a kernel has an error."""
    parser = argparse.ArgumentParser(prog="python -m bench.instruments.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--case", default="", help="regular expression that matches the beginning of the case names")
    parser.add_argument("--out", type=Path, help="also write the table to this file, as Markdown")
    options = parser.parse_args()
    try:
        re.compile(options.case)
    except re.error as error:
        parser.error(f"--case {options.case!r} is no regular expression: {error}")
    if triton.knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    columns = ["kernel", "case", "arch", "warps", "registers", "shared", "spilled", "loads x bits", "wrong"]
    lines = header(columns)
    failed = 0
    sys.stdout.write("\n".join(lines) + "\n")
    for row, wrong in rows(options.case, options.arch):
        failed += bool(wrong)
        lines.append(line(row))
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    if len(lines) == 2:
        parser.error(f"no case begins with {options.case!r}: the table in bench/results/compiled.md lists them")
    sys.stdout.write(f"{len(lines) - 2} kernels compiled, {failed} wrong\n")
    if options.out:
        by = f"triton {triton.__version__} by `python -m bench.instruments.compile`"
        write_table(options.out, f"Compiled with {by}; no GPU was used.", lines)
    return 1 if failed else 0


def cuobjdump(option: str, file: str) -> str:
    """Return the output of NVIDIA's cuobjdump, which is part of the triton package, for a file."""
    return subprocess.run([_CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
