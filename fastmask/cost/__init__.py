"""What training costs, by formula: work and memory, predictions, and the plan of a dry run."""
