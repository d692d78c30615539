"""TPUs, through XLA. The only file of this room that imports jax."""
