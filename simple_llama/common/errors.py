"""The one error type that is shown to people without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something a person can put right: the message says what was expected, what was found and what to do."""
