"""The tokenizer: loading and training it, and reading JSON records."""
