"""Weights of other libraries' models as ours, and back."""
