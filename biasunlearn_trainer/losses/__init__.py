"""The losses: pure functions, one value per sequence."""
