"""The common base of the workers: a JSON-over-HTTP server, numbered log lines, proof of identity.

Standard library only, and starts in a tenth of a second: most end-to-end tests wait for a worker.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Json = dict[str, object]
RESTORED: Final = "/run/quickthaw/restored.json"
READY: Final = "/run/quickthaw/ready"


class LineLog:
    """Numbered lines on stdout, a write(2) each: a line lost or doubled shows as a gap."""

    def __init__(self) -> None:
        # Reentrant: a signal handler logs too, in the middle of any step of the main thread.
        self._lock = threading.RLock()
        self.lines = 0

    def say(self, text: str, fd: int = 1) -> int:
        """Write `NNNNNNNN text` and return the number. Numbers start at 1, over all fds."""
        with self._lock:
            self.lines += 1
            os.write(fd, f"{self.lines:08d} {text}\n".encode())
            return self.lines


@dataclass
class Identity:
    """Facts that only this process can know: a restored process has its source's nonce."""

    worker: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    started: float = field(default_factory=time.monotonic)
    requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count_request(self) -> int:
        """Count a request. Returns the number of requests so far."""
        with self._lock:
            self.requests += 1
            return self.requests

    def describe(self) -> Json:
        """Returns nonce, pid, hostname, seconds since the start and requests answered so far."""
        return {
            "worker": self.worker,
            "nonce": self.nonce,
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "uptime_s": round(time.monotonic() - self.started, 3),
            "requests": self.requests,
            "threads": threading.active_count(),
        }


def restored() -> object:
    """Returns the content of restored.json, written for a restored process, or None."""
    try:
        with open(RESTORED, "rb") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


class BadRequest(Exception):
    """The query lacks a parameter, or a parameter has a wrong value."""


@dataclass(frozen=True)
class Ask:
    """A request, with its query parameters parsed."""

    query: dict[str, str]
    body: bytes
    local: tuple[str, int]
    peer: tuple[str, int]

    def text(self, name: str, default: str | None = None) -> str:
        """Returns a parameter as text. Raises BadRequest when it is absent and has no default."""
        value = self.query.get(name, default)
        if value is None:
            raise BadRequest(f"parameter {name} is missing")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a parameter as a number. Raises BadRequest like `text`, and for other text."""
        value = self.text(name, None if default is None else str(default))
        try:
            return float(value)
        except ValueError:
            raise BadRequest(f"parameter {name} is not a number: {value}") from None

    def whole(self, name: str, default: int | None = None) -> int:
        """Returns a parameter as an integer, decimal or 0x or 0o. Raises like `number`."""
        value = self.text(name, None if default is None else str(default))
        try:
            return int(value, 0)
        except ValueError:
            raise BadRequest(f"parameter {name} is not an integer: {value}") from None

    def flag(self, name: str) -> bool:
        """Whether a parameter is given as 1."""
        return self.query.get(name) == "1"


@dataclass(frozen=True)
class Reply:
    """An answer with a status of its own; handlers that return a plain value answer 200."""

    status: int
    value: object


if TYPE_CHECKING:
    Handler = Callable[[Ask], object]
    Routes = Mapping[str, Handler]


def answer(routes: Routes, path: str, ask: Ask) -> Reply:
    """Call the handler of `path`; its failures become statuses: 400, 404, 409 for an OSError."""
    handler = routes.get(path)
    if handler is None:
        return Reply(404, {"error": f"no such endpoint: {path}", "endpoints": sorted(routes)})
    try:
        value = handler(ask)
    except BadRequest as bad:
        return Reply(400, {"error": str(bad)})
    except OSError as failed:
        name = errno.errorcode.get(failed.errno or 0, "?")
        return Reply(409, {"error": str(failed), "errno": name})
    return value if isinstance(value, Reply) else Reply(200, value)


class Server(ThreadingHTTPServer):
    """A listening address of a worker. Every listener of a worker has the same routes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, routes: Routes, log: LineLog, me: Identity) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.routes, self.log, self.me = routes, log, me
        self.server_name = host
        super().__init__((host, port), _Conversation)

    def server_bind(self) -> None:
        # `::` must not take the port from a listener on 0.0.0.0. The stock class would resolve its
        # own name, which takes seconds in a pod without DNS.
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_port = int(self.server_address[1])

    def start(self) -> None:
        """Serve on a thread of its own."""
        threading.Thread(target=self.serve_forever, args=(60,), daemon=True).start()


class _Conversation(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms by delayed acknowledgement
    server: Server  # type: ignore[mutable-override]  # always made by one

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        here = self.connection.getsockname()[:2]
        number = self.server.me.count_request()
        reply = answer(
            self.server.routes, url.path, Ask(query, body, here, self.client_address[:2])
        )
        # Logged before the answer: a client with the answer can rely on the line.
        self.server.log.say(f"request {number} {self.command} {url.path} {reply.status}")
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        data = json.dumps(reply.value).encode() + b"\n"
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: the numbered line is enough."""


def port_from_environment(default: int = 8000) -> int:
    """Returns the port that the pod's author chose with PORT."""
    return int(os.environ.get("PORT", default))


def stop_on_sigterm(log: LineLog, delay_s: float = 0.0, code: int = 0) -> None:
    """Log SIGTERM, wait, and exit: pid 1 of a container has no default action for SIGTERM."""

    def stop(number: int, _: object) -> None:
        log.say(f"signal {signal.Signals(number).name}")
        time.sleep(delay_s)
        log.say(f"exit {code}")
        sys.exit(code)

    signal.signal(signal.SIGTERM, stop)
