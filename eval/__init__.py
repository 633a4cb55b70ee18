"""Evaluation: bias and ability, measured the same way before and after."""
