"""Sends events to the API server from a thread of its own. Nothing ever waits for the sender.

An event that cannot be sent is counted and logged, at most every few minutes; pods start all the
same. The queue is bounded: events beyond its size are dropped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, Final

from shim.contract import jsontext
from shim.kube import event as events
from shim.kube.event import EventMemory, Known, PodEvent, Rate
from shim.kube.kubeconfig import Access, BadKubeconfig, load

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("quickthawd")

SENT, DROPPED, FAILED = "sent", "dropped", "failed"
"""The fate of an event. DROPPED: beyond the rate or the queue. FAILED: the server refused it."""

_QUEUE: Final = 256
_REQUEST_S: Final = 10.0
_IDLE_S: Final = 30.0
_TRIES: Final = 3
_WAIT_S: Final = 1.0
_TELL_EVERY_S: Final = 300.0
_STOP_S: Final = 2.0
_MAX_ANSWER: Final = 64 * 1024
_GONE: Final = 404
_TOO_MANY: Final = 429
_SERVER_ERROR: Final = 500


class ServerRefused(Exception):
    """The API server answered with an error. status: of HTTP."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"{status}: {why}")
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether the server may accept the same request a moment later."""
        return self.status == _TOO_MANY or self.status >= _SERVER_ERROR


class Sender:
    """Sends queued events. path: of the kubeconfig. counted: gets SENT, DROPPED or FAILED."""

    def __init__(
        self, path: str, counted: Callable[[str], None], *, node: str, wait_s: float = _WAIT_S
    ) -> None:
        self._path, self._counted, self._node, self._wait_s = path, counted, node, wait_s
        self._queue: queue.Queue[PodEvent | None] = queue.Queue(_QUEUE)
        self._rate, self._memory = Rate(), EventMemory()
        self._connection: http.client.HTTPSConnection | None = None
        self._access: Access | None = None
        self._told_at, self._lost = -_TELL_EVERY_S, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubernetes events", daemon=True)

    def start(self) -> None:
        """Log at once when the kubeconfig cannot be used, and start the thread.

        The kubeconfig is read again for each connection.
        """
        try:
            load(self._path)
        except (BadKubeconfig, OSError) as error:
            log.warning("kubeconfig %s: %s; no Kubernetes events meanwhile", self._path, error)
        self._thread.start()

    def stop(self) -> None:
        """Send the queued events, for a moment, and end."""
        self._stop.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the thread; with a full queue it is awake
        self._thread.join(_STOP_S)

    def send(self, event: PodEvent) -> None:
        """Queue the event, or drop it. Never blocks and never raises."""
        if not event.namespace or not event.pod:
            return
        key = event.uid or f"{event.namespace}/{event.pod}"
        try:
            if not self._rate.allows(key, time.monotonic()):
                raise queue.Full
            self._queue.put_nowait(event)
        except queue.Full:
            self._counted(DROPPED)

    def _run(self) -> None:
        while not (self._stop.is_set() and self._queue.empty()):
            try:
                event = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                event = None
            if event is None:
                self._disconnect()
            else:
                self._deliver(event)
        self._disconnect()

    def _deliver(self, event: PodEvent) -> None:
        """Send an event, with a few retries. Never raises: the thread must live."""
        why: Exception | None = None
        for number in range(_TRIES):
            if number:
                self._stop.wait(self._wait_s * 2 ** (number - 1))
            try:
                self._tell(event)
                self._counted(SENT)
                return
            except ServerRefused as error:
                why = error
                if not error.passes:
                    break
            except (OSError, http.client.HTTPException, ssl.SSLError, BadKubeconfig) as error:
                why = error
                self._disconnect()
            except Exception as error:
                # The border: a defect here must not silence all later events.
                log.exception("Kubernetes event")
                why = error
                break
        self._counted(FAILED)
        self._complain(why)

    def _complain(self, why: Exception | None) -> None:
        self._lost += 1
        if time.monotonic() - self._told_at < _TELL_EVERY_S:
            return
        log.warning(
            "cannot send Kubernetes events (%s): %s; %d events lost. Pods are not affected.",
            self._path, why, self._lost,
        )  # fmt: skip
        self._told_at, self._lost = time.monotonic(), 0

    def _tell(self, event: PodEvent) -> None:
        now = time.time()
        collection = f"/api/v1/namespaces/{urllib.parse.quote(event.namespace, safe='')}/events"
        if known := self._memory.again(event):
            try:
                self._request(
                    "PATCH", f"{collection}/{urllib.parse.quote(known.name, safe='')}",
                    events.patch(event, known, now), "application/strategic-merge-patch+json",
                )  # fmt: skip
                self._memory.remember(event, known)
                return
            except ServerRefused as error:
                if error.status != _GONE:
                    raise
                self._memory.forget(event)
        known = Known(events.name_of(event, now), now, 1)
        made = events.body(event, known, self._node, now)
        self._request("POST", collection, made, "application/json")
        self._memory.remember(event, known)

    def _request(self, method: str, target: str, content: dict[str, Any], kind: str) -> None:
        """Make a request on the open connection, or on a new one. Raises ServerRefused, OSError."""
        access, connection = self._connected()
        headers = {
            "Content-Type": kind, "Accept": "application/json",
            "User-Agent": f"{events.COMPONENT}/1",
        }  # fmt: skip
        if access.token:
            headers["Authorization"] = f"Bearer {access.token}"
        connection.request(method, access.path + target, json.dumps(content).encode(), headers)
        answer = connection.getresponse()
        said = answer.read(_MAX_ANSWER)
        if answer.read(1) or answer.will_close:
            self._disconnect()  # an answer beyond the limit, or the server asks to close
        if not 200 <= answer.status < 300:
            self._disconnect()  # the next connection reads rotated credentials
            raise ServerRefused(answer.status, _message(said))

    def _connected(self) -> tuple[Access, http.client.HTTPSConnection]:
        if self._connection is None or self._access is None:
            self._access = load(self._path)
            self._connection = _Connection(self._access)
        return self._access, self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class _Connection(http.client.HTTPSConnection):
    """HTTPS to a server whose certificate may be for another name than the host of the URL."""

    def __init__(self, access: Access) -> None:
        super().__init__(access.host, access.port, timeout=_REQUEST_S, context=access.tls)
        self._access_tls, self._server_name = access.tls, access.server_name

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = self._access_tls.wrap_socket(plain, server_hostname=self._server_name)
        except BaseException:
            plain.close()
            raise


def _message(said: bytes) -> str:
    """Returns the server's error message: of a Status object, or the start of the answer."""
    try:
        found = jsontext.parse(said)
        text = str(found["message"])
    except (ValueError, KeyError, TypeError):
        text = said[:200].decode(errors="replace")
    return " ".join(text.split())[:400]
