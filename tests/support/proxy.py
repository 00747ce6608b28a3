"""A proxy between client and server: it counts traffic, and simulates a bad network."""

from __future__ import annotations

import dataclasses
import http.client
import http.server
import random
import threading
import time
from typing import Any, Literal

Trouble = Literal["refuse", "drop before", "drop after", "truncate", "delay", "twice"]


@dataclasses.dataclass(slots=True)
class Traffic:
    """The traffic so far; `down` is from the server."""

    num_requests: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


class Proxy:
    """A server in front of another.

    Args:
        url: The server's URL.

    Attributes:
        traffic: The traffic so far.
        trouble: Chance of trouble with a request; 0 for none.
        up_bytes_per_second: Limit of the clients' total upload rate; None for no limit.
        is_down: Whether every request is refused for now.
        refusal: Status and body of every answer; None to ask the server.
        troubles: How often what went wrong.
    """

    def __init__(self, url: str, *, trouble: float = 0.0, seed: int = 0) -> None:
        self.traffic = Traffic()
        self.trouble = trouble
        self.up_bytes_per_second: float | None = None
        self.is_down = False
        self.refusal: tuple[int, bytes] | None = None
        self.troubles: dict[str, int] = {}
        self._server = url.removeprefix("http://")
        self._random = random.Random(seed)
        self._free_at = 0.0
        self._mutex = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

            def _forward(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _trouble(self) -> tuple[Trouble | None, int]:
        with self._mutex:
            self.traffic.num_requests += 1
            if self.is_down:
                return "refuse", 503
            if self._random.random() >= self.trouble:
                return None, 0
            kinds: tuple[Trouble, ...] = (
                *("refuse", "refuse", "drop before", "drop after"),
                *("truncate", "delay", "twice"),
            )
            kind = self._random.choice(kinds)
            self.troubles[kind] = self.troubles.get(kind, 0) + 1
            return kind, self._random.choice((500, 503, 429))

    def _handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if self.up_bytes_per_second is not None:
            self._hold_back(len(body) / self.up_bytes_per_second)
        if self.refusal is not None:
            self._answer(request, self.refusal[0], [], self.refusal[1])
            return
        trouble, status = self._trouble()
        if trouble == "refuse":
            self._answer(request, status, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        if trouble == "drop before":
            request.close_connection = True
            request.connection.close()
            return
        if trouble == "delay":
            time.sleep(0.2)
        if trouble == "twice":
            self._ask(request, body)
        status, headers, data = self._ask(request, body)
        with self._mutex:
            self.traffic.up_bytes += len(body)
            self.traffic.down_bytes += len(data)
        if trouble == "drop after":
            request.close_connection = True
            request.connection.close()
            return
        cut = len(data) // 2 if trouble == "truncate" else None
        self._answer(request, status, headers, data, cut=cut)

    def _hold_back(self, seconds: float) -> None:
        """Serialises all uploads, while there is a limit."""
        with self._mutex:
            passed = self._free_at = max(self._free_at, time.monotonic()) + seconds
        while self.up_bytes_per_second is not None and (left := passed - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _ask(
        self, request: http.server.BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._server, timeout=60)
        try:
            connection.request(request.command, request.path, body, dict(request.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        *,
        cut: int | None = None,
    ) -> None:
        request.send_response_only(status)
        is_sized = False
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection"):
                request.send_header(name, value)
                is_sized = is_sized or name.lower() == "content-length"
        if not is_sized:
            request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            request.close_connection = True
            request.wfile.flush()
            request.connection.close()
