"""Supervised fine-tuning of all weights."""
