"""The model: its configuration, layers and checkpoint files."""
