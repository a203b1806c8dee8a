"""Settings of ``dpar app``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipeline.settings.fields import HARDWARE, MODEL, OUTPUT, RUN_TIME, Device, require


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """Settings of the web page."""

    host: Annotated[str, "Address to listen at; 0.0.0.0 makes the page available to other machines.", HARDWARE] = (
        "127.0.0.1"
    )
    port: Annotated[int | None, "Port to listen at. (default: the first free one from 7860)", HARDWARE] = None
    browser: Annotated[bool, "Open the page in the browser.", OUTPUT] = False
    tokenizer: Annotated[
        str | None, "Weights of a run's tokenizer. (default: those recorded by the run)", MODEL, RUN_TIME
    ] = None
    entropy_model: Annotated[
        str | None, "Weights of a run's entropy model. (default: those recorded by the run)", MODEL, RUN_TIME
    ] = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        require(self.port is None or 1 <= self.port <= 65535, f"--port is {self.port}; it must be from 1 to 65535")
