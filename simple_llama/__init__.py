"""SimpleLLaMA with Direct Preference Optimization on DeepSpeed."""
