"""Trainers, one file a method."""
