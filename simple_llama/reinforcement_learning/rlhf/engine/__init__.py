"""DeepSpeed: the policy under ZeRO, its settings, its traffic, and the states it resumes from."""
