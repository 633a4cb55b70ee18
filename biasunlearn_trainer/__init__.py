"""Unlearning of social bias in language and image-text models."""
