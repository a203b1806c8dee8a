"""The one error a stage raises for what a user can put right.

    raise StageError("photos/: no images found in it; expected photos/CLASS/picture.jpg")

The command line prints the message and exits with status 1; anything else that reaches it is a fault of ours. Of the
processes that ``torchrun`` starts on a machine, the first that fails prints its message, and no other does.
"""

from __future__ import annotations

import os
from pathlib import Path


class StageError(ValueError):
    """A user's input to a stage cannot be used: one message with what, where, what to do."""


class PeerEnded(StageError):
    """A process of this run lost another one, which has said why it ended."""


def claim_error_report(error: BaseException) -> bool:
    """Return whether this process is to report ``error``: of those that ``torchrun`` started, one on each machine does.

    A process that only lost its peers leaves it to them, and to torchrun where they were killed. True for a process
    of its own.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/RANK/error.json, removed by torchrun at its end
    if not error_file:
        return True
    if isinstance(error, PeerEnded):
        return False
    try:
        os.close(os.open(Path(error_file).parent.parent / "dpar-error-reported", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
