"""Training runs: the main path (run.py), the loop, the losses, checkpoints, and what people see."""
