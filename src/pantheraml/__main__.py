"""`python -m pantheraml` is `pantheraml`."""

from pantheraml.cli import main

main()
