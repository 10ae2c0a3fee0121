"""`python -m bench.resources LIBRARY`: registers, shared memory and spills of the CUDA C++ kernels, with no GPU.

Read from the machine code of the library that `make cuda` builds. A kernel that spills fails.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.compile import cuobjdump
from bench.tables import header, line
from fastmask.files import whole_file


def rows(usage: str) -> Iterator[tuple[list[str], bool]]:
    """Yield a table row for each kernel and architecture, and whether it spills.

    Args:
        usage: what `cuobjdump --dump-resource-usage` prints, with the names demangled.
    """
    architecture = name = ""
    for text in usage.splitlines():
        if found := re.match(r"arch = (\w+)", text):
            architecture = found[1]
        elif found := re.search(r"Function .*?(\w+)_kernel(<.*>)?\(", text):
            name = found[1] + (found[2] or "").replace("__nv_bfloat16", "bf16").replace("float", "fp32")
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
            registers, stack, shared, local = map(int, found.groups())
            yield [name, architecture, str(registers), str(shared), str(stack + local)], stack + local > 0


def main() -> int:
    """Print the table, and return 1 if a kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, help="also write the table here, as Markdown")
    options = parser.parse_args()
    demangled = subprocess.run(
        ["c++filt"],
        input=cuobjdump("--dump-resource-usage", str(options.library)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = sorted(rows(demangled.stdout))
    if not found:
        parser.error(f"no kernels in {options.library}")
    columns = ["kernel", "arch", "registers", "shared", "spilled"]
    lines = [*header(columns), *(line(row) for row, _ in found)]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out:
        head = "Compiled by `make cuda`, and read with `python -m bench.resources`; no GPU was used.\n\n"
        with whole_file(options.out) as partial:
            partial.write_text(head + "\n".join(lines) + "\n")
    return 1 if any(spills for _, spills in found) else 0


if __name__ == "__main__":
    sys.exit(main())
