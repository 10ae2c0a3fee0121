"""Networks: layers, stacks of blocks, exact counts of parameters and operations."""
