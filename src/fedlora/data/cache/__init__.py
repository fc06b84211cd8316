"""Pictures at the model's size: read once, resized once, in memory or on disk."""
