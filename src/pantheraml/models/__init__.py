"""Weights into memory, on purpose: loading, adapters, and what is swapped into one model instance."""
