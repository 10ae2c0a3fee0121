"""How good a trained network's samples are."""
