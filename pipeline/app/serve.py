"""``dpar app``: serve the page until Ctrl-C or SIGTERM.

serve("builtin:emoji", AppSettings(), ready=print)           # ready gets the page's address
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.runtime.errors import StageError
from pipeline.settings.app import AppSettings


def serve(name: str, settings: AppSettings, ready: Callable[[str], None]) -> None:
    """Serve the page of a bundle or a run. Its files are in a temporary directory, which is deleted at the end.

    Args:
        name: a bundle's directory, built-in name or Hub name, or a run of ``dpar train``.
        settings: see :class:`AppSettings`.
        ready: called with the address once the page answers.

    Raises:
        StageError, ModelError: Gradio is not installed, the model cannot be loaded, or the port is taken.
    """
    if settings.port is not None:
        _check_port(settings.host, settings.port)
    with _sigterm_like_ctrl_c(), tempfile.TemporaryDirectory(prefix="dpar-app-") as folder:
        # Gradio reads these when it is imported or answers its first request.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise StageError("dpar app needs Gradio: pip install 'dpar[app]'") from error
        from pipeline.app.model import load_model
        from pipeline.app.page import LAUNCH, build

        page = build(load_model(name, settings), Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=settings.host,
                server_port=settings.port,
                inbrowser=settings.browser,
                prevent_thread_lock=True,
                quiet=True,
                **LAUNCH,
            )
        except OSError as error:  # no port from 7860 is free
            raise StageError(f"cannot listen at {settings.host}: {error}; name a free port with --port") from error
        with contextlib.suppress(KeyboardInterrupt):
            ready(address)
            threading.Event().wait()
        page.close(verbose=False)


@contextlib.contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt, so that the temporary directory is deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_port(host: str, port: int) -> None:
    """Raise StageError if the port cannot be used; Gradio would only notice after the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise StageError(
            f"cannot listen at {host}, port {port}: {error.strerror}; name another port with --port, or omit it"
        ) from error
