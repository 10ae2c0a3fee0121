"""The GPU measurement campaign, `python -m bench.campaign`; see `__main__` for how it works.

It must run with only torch, triton and numpy installed, and without a network.
"""

import time

STARTED = time.monotonic()  # before torch is imported, which counts too
