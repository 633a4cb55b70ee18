"""Readers and builders of unlearning sets."""
