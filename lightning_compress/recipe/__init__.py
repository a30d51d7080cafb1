"""A run written down: YAML read safely, checked before anything is made, then built, shown as a timeline, or run."""

from lightning_compress.recipe.recipe import Recipe

__all__ = ["Recipe"]
