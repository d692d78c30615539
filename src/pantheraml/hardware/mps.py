"""Apple's GPUs through Metal. The only file that spells torch.mps."""
