"""Typed recipes: one flat YAML with overrides from the command line, checked as a whole before anything is loaded."""

from biasunlearn_trainer.recipe.parse import Recipe, RecipeError, parse_recipe

__all__ = ["Recipe", "RecipeError", "parse_recipe"]
