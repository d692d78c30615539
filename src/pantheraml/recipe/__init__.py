"""What was asked: recipes, their defaults, and how a YAML file becomes one. Needs no torch."""
