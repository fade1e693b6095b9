"""Direct Preference Optimization; apply_dpo.py is the file to read first."""
