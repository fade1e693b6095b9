"""The one error type that is shown to people without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something a person can put right: the message says what was expected, what was found and what to do.

    Where ranks have told each other that they end with the same one, `sharers` counts them, and it `is_said` by another
    rank on all but one of them. `everywhere`: all ranks raise one of these at this moment.
    """

    sharers = 1
    is_said = False
    everywhere = False
