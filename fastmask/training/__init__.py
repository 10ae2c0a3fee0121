"""The training of a run: configuration, step, optimizer, averages, checkpoints, monitors and reports."""
