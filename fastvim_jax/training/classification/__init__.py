"""Supervised classification: its config, loss, evaluation and trainer."""
