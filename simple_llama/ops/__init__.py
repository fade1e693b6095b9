"""The hot operations: attention over packed layouts, and log-probs without stored logits."""
