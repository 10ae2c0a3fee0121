"""Networks: their layers, stacks of blocks, and exact counts of what they compute."""
