"""A training run: the order, one optimizer step, metrics, evaluation, saves, and what it writes."""
