"""Callbacks: averaging, checkpoints, records, progress."""
