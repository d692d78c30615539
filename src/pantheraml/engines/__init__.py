"""Two ways to run one step: torch (CPU, CUDA, XPU), and XLA for TPU in a later issue."""
