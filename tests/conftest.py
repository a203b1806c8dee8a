"""Ctrl-C, the order of tests, and a shared fixture.

Some tests press Ctrl-C, which a shell ignores in the processes that it starts in the background.
"""

import signal
from collections.abc import Iterator

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first, so that workers do not wait for it at the end."""
    items.sort(key=lambda item: not item.name.startswith("test_the_demo_"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread, for reproducible sums and for processes that share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
