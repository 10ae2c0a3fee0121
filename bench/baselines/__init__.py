"""Baselines: the same networks in plain PyTorch, carefully written from the papers."""
