"""Ctrl-C and the order of tests.

Some tests press Ctrl-C, and a shell that runs the tests in the background starts them with it ignored.
"""

import signal

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: not item.name.startswith("test_the_demo_"))
