"""Commands that turn published checkpoints into folders that transformers loads."""
