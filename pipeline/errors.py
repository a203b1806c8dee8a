"""The one error a stage raises for what a user can put right.

    raise StageError("photos/: no images found in it; expected photos/CLASS/picture.jpg")

The command line prints the message and exits with status 1; anything else that reaches it is a fault of ours.
"""

from __future__ import annotations


class StageError(ValueError):
    """A user's input to a stage cannot be used: one message with what, where, what to do."""
