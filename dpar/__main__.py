"""``python -m dpar``, ``torchrun -m dpar`` and the ``dpar`` script: the command line."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Run ``cli.py``, loaded by path so that another module called ``cli`` cannot shadow it.

    It is next to the packages in a checkout, and in ``dpar/command/`` in a wheel (see pyproject.toml).
    """
    home = Path(__file__).parent
    installed, checkout = home / "command" / "cli.py", home.parent / "cli.py"
    spec = spec_from_file_location("dpar.command.cli", installed if installed.is_file() else checkout)
    assert spec is not None  # the path ends in .py
    assert spec.loader is not None
    cli = module_from_spec(spec)
    spec.loader.exec_module(cli)
    cli.main()


if __name__ == "__main__":
    main()
