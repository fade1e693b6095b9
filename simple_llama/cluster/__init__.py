"""Ranks and their ends: who is who, what stops them, who watches them, who may write a folder."""
