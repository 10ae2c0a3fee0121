"""Cost model of training: operations, traffic and memory of a step, predicted throughput, the plan of a dry run."""
