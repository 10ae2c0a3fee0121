"""What the ops move between memory and a GPU, counted without data at full size."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_ops_move_within_a_tenth_of_the_least_possible():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.instruments.traffic"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    assert len({row[0] for row in rows}) == 6
    for op, dtypes, direction, *counts in rows:
        _, ours, compiled, eager, ratio = map(float, counts)
        assert 1 <= ratio <= 1.1, (op, dtypes, direction)
        assert compiled <= eager, (op, dtypes, direction)
        if "norm" in op:
            assert ours < compiled, (op, dtypes, direction)
