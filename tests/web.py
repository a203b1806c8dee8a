"""A web server on loopback for tests: it serves a folder, and breaks connections on request."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class WebServer:
    """Serves ``folder`` at ``url``; the attributes may change at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True  # whether Range headers are obeyed
        self.most_bytes: int | None = None  # after which every answer is cut off
        self.silent = 0  # number of next requests to leave unanswered
        self.refused: str | None = None  # a path to answer with 503
        self.requests: list[str] = []  # paths of all GETs
        self.sent = 0  # bytes of all bodies
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                if outer.silent:
                    outer.silent -= 1
                    time.sleep(20)
                    outer.requests.append("ended in silence")
                    return
                path = outer.folder / self.path[1:]
                if self.path == outer.refused or not path.is_file():
                    self.send_error(503 if self.path == outer.refused else 404)
                    return
                data, status = path.read_bytes(), 200
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked and outer.ranges:
                    data, status = data[int(asked[1]) : int(asked[2]) + 1], 206
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    data = data[: outer.most_bytes]
                    outer.sent += len(data)
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
