"""Settings of ``dpar app``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipeline.settings.fields import HARDWARE, MODEL, OUTPUT, RUN_TIME, Device, require


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """The page in the browser."""

    host: Annotated[
        str, "Address to listen at; 0.0.0.0 lets every machine that reaches this one use the page.", HARDWARE
    ] = "127.0.0.1"
    port: Annotated[int | None, "Port to listen at. (default: the first free one from 7860)", HARDWARE] = None
    browser: Annotated[bool, "Open the page in the browser.", OUTPUT] = False
    tokenizer: Annotated[str | None, "Of a run: its weights. (default: those of its data)", MODEL, RUN_TIME] = None
    entropy_model: Annotated[str | None, "Of a run: its weights. (default: those of its data)", MODEL, RUN_TIME] = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        require(self.port is None or 1 <= self.port <= 65535, f"--port is {self.port}; it must be from 1 to 65535")
