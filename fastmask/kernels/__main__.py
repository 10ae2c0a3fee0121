"""`python -m fastmask.kernels`: which kernel each op has on a GPU and on the CPU, and why one is missing."""

import sys

import fastmask.kernels as ops


def main() -> None:
    """Print a line per op and device."""
    for row in ops.backends():
        sys.stdout.write(f"{row.op:<24} {row.device:<5} {row.kernel:<8} {row.reason}\n")


if __name__ == "__main__":
    main()
