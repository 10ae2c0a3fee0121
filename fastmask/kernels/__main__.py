"""`python -m fastmask.kernels`: which kernel each public op has on a GPU and on the CPU, and why one is missing.

Then what `attention` can use, in its order of preference.
"""

import signal
import sys

import fastmask.kernels as ops


def main() -> None:
    """Print a line per op and device, and one per attention library and device."""
    for row in ops.backends():
        sys.stdout.write(f"{row.op:<24} {row.device:<5} {row.kernel:<10} {row.reason}\n")
    for device in ("cuda", "cpu"):
        for backend in ops.attention_backends(device):
            usable = backend.name if backend.usable else "none"
            sys.stdout.write(f"{'attention by ' + backend.name:<24} {device:<5} {usable:<10} {backend.note}\n")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # a reader that leaves early, such as `head`, ends this without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
