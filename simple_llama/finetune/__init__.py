"""The chat format, and the small supervised fine-tuning that makes a starting model."""
