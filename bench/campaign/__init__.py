"""Everything that only a GPU can tell, from one command, `python -m bench.campaign`; `__main__` says how it works.

It must run where torch, triton and numpy are installed and nothing else, without a network.
"""

import time

STARTED = time.monotonic()  # before torch is imported: that time is the user's too
