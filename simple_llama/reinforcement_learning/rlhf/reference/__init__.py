"""Log-probs of the frozen reference: kept on disk, or computed by a model in memory."""
