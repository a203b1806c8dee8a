"""``dpar app``: the page, served until Ctrl-C or SIGTERM.

serve("builtin:emoji", AppSettings(), ready=print)           # ready gets the page's address
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.app.model import load_model
from pipeline.runtime.errors import StageError
from pipeline.settings.app import AppSettings


def serve(name: str, settings: AppSettings, ready: Callable[[str], None]) -> None:
    """Serve the page of a bundle or a run; what it writes is in a temporary directory, deleted at the end.

    Args:
        name: a bundle's directory, built-in name or Hub name, or a run of ``dpar train``.
        settings: see :class:`AppSettings`.
        ready: called with the address once the page answers.

    Raises:
        StageError, ModelError: Gradio is not installed, the model cannot be loaded, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="dpar-app-") as folder:
        # Gradio reads these when it is imported or answers its first request.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise StageError("dpar app needs Gradio: pip install 'dpar[app]'") from error
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
        except OSError as error:
            raise StageError(
                f"cannot listen at {settings.host}, port {settings.port or '7860 and up'}: name a free one with --port"
            ) from error
        ready(address)
        try:
            _wait()
        finally:
            page.close(verbose=False)


def _wait() -> None:
    """Return at Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Event().wait()
