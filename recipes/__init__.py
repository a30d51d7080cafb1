"""YAML recipes, and the small, plain Lightning runs that they are shown on."""
