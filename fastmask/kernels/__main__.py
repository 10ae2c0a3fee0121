"""`python -m fastmask.kernels`: prints the kernel of each public op on GPU and CPU, or why it is missing.

Then the backends of `attention`, in order of preference.
"""

import signal
import sys

import fastmask.kernels as ops


def main() -> None:
    """Print a line per op and device, and a line per attention backend and device."""
    for row in ops.backends():
        sys.stdout.write(f"{row.op:<24} {row.device:<5} {row.kernel:<10} {row.reason}\n")
    for device in ("cuda", "cpu"):
        for backend in ops.attention_backends(device):
            usable = backend.name if backend.usable else "none"
            sys.stdout.write(f"{'attention by ' + backend.name:<24} {device:<5} {usable:<10} {backend.note}\n")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # exit silently if the reader closes the pipe, such as `head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
