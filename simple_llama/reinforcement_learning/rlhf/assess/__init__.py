"""Models against pairs, outside a run: launch/evaluate.py."""
