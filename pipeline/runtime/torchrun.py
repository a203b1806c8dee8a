"""``dpar-torchrun``: torchrun with the exit status of ``dpar`` and without an extra traceback.

    dpar-torchrun --nproc-per-node 8 -m dpar train patches run

It takes torchrun's arguments and forwards SIGTERM, Ctrl-C and SIGUSR1 to all processes, which save the step. Plain
torchrun also forwards them with ``--signals-to-handle``, but prints a traceback and always exits with status 1.
"""

from __future__ import annotations

import sys

from pipeline.runtime.progress import STATUSES

HANDLED = ["--signals-to-handle", ",".join(number.name for number in STATUSES)]


def main() -> None:
    """The entry point of the ``dpar-torchrun`` command."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun([*HANDLED, *sys.argv[1:]])
    except SignalException as stopped:
        sys.exit(STATUSES[stopped.sigval])
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        sys.exit(status if status > 0 else 128 - status)  # like a shell, if a signal killed the process


if __name__ == "__main__":
    main()
