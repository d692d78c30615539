"""The arithmetic: one file an operation, with its reference and its backward."""
