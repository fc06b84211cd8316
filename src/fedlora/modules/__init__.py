"""The CLIP classifier and its LoRA adapter."""
