"""Serves the control socket: a JSON line with root's request, a JSON line with the answer.

    {"verb": "show", "id": "3f2a"}      ->  {"result": {…}}
                                        ->  {"error": {"class": "NoSuchSnapshot", "what": …}}

This module owns the socket and the tasks of its connections; the daemon gives it the handlers of
the verbs. A QuickthawError travels with all of its parts, and the client raises the same error
(`shim.cli.client`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from shim.contract import jsontext
from shim.contract.errors import BadRequest, QuickthawError
from shim.contract.paths import SOCKET
from shim.kernel import replace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 64 * 1024
REQUEST_S: Final = 5.0
"""Seconds that a client may take to send its line, and to take its answer."""
_MOST_AT_ONCE = 32
_BACKLOG = 16
_UCRED = struct.Struct("3i")


async def serve(
    handlers: Mapping[str, Handler],
    *,
    path: str = SOCKET,
    uid: int = 0,
    within_s: float = REQUEST_S,
) -> None:
    """Answer requests until cancelled; requests under way are then cancelled, too.

    handlers: by verb; each takes the request without its verb, and returns plain JSON or raises a
    QuickthawError. uid: the only user who gets answers. Raises OSError when the socket cannot be
    made.
    """
    turns = asyncio.Semaphore(_MOST_AT_ONCE)
    with _listening(path) as listener:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await turns.acquire()
                connection = await _accept(listener)
                task = tasks.create_task(
                    _converse(connection, handlers, uid, within_s), name="control request"
                )
                task.add_done_callback(lambda _: turns.release())


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """Yields the socket, put in place with one rename, so that its mode is always 0600."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        replace.take_away(f"{path}.new")
        listener.bind(f"{path}.new")
        os.chmod(f"{path}.new", 0o600)
        listener.listen(_BACKLOG)
        os.rename(f"{path}.new", path)
        try:
            yield listener
        finally:
            replace.take_away(path)


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        try:
            return (await asyncio.get_running_loop().sock_accept(listener))[0]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                raise
            log.warning("control socket: %s", error)
            await asyncio.sleep(0.5)  # descriptors come back when others are done


async def _converse(
    connection: socket.socket, handlers: Mapping[str, Handler], uid: int, within_s: float
) -> None:
    """Serve a connection from request to answer. Never raises for anything that a client does."""
    try:
        reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_REQUEST_BYTES)
    except OSError as error:
        connection.close()
        log.info("control socket: %s", error)
        return
    try:
        writer.write(await _answer(reader, handlers, _peer_uid(connection) == uid, within_s))
        async with asyncio.timeout(within_s):
            await writer.drain()
            writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        log.info("control socket: the client takes no answer: %r", error)
    finally:
        writer.transport.abort()


def _peer_uid(connection: socket.socket) -> int:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(found)[1]
    return uid


async def _answer(
    reader: asyncio.StreamReader, handlers: Mapping[str, Handler], allowed: bool, within_s: float
) -> bytes:
    try:
        if not allowed:
            raise bad_request("request", "only root is answered", "Run it as root.")
        async with asyncio.timeout(within_s):
            line = await reader.readline()
        answer = {"result": await _dispatch(parse(line), handlers)}
        return (await asyncio.to_thread(json.dumps, answer)).encode() + b"\n"
    except QuickthawError as error:
        return refusal(error)
    except TimeoutError:
        return refusal(bad_request("request", f"no line within {within_s:g} s", "Send one line."))
    except ValueError as error:  # of readline: longer than its limit
        return refusal(bad_request("request", str(error), "Send one short line."))
    except Exception as error:
        # The border: a request must not end the daemon.
        log.exception("control request")
        why = f"{type(error).__name__}: {error}"
        return refusal(
            QuickthawError("the request failed", about="control socket", why=why,
                           do="See `journalctl -u quickthawd`.")
        )  # fmt: skip


async def _dispatch(request: dict[str, Any], handlers: Mapping[str, Handler]) -> Mapping[str, Any]:
    verb = request.pop("verb")
    if verb not in handlers:
        known = ", ".join(sorted(handlers))
        raise bad_request(verb[:40], "there is no such verb", f"There are: {known}.")
    return await handlers[verb](request)


def parse(line: bytes) -> dict[str, Any]:
    """Returns the request in a line. Raises BadRequest for any other line."""
    try:
        request = jsontext.parse(line)
    except ValueError as error:
        raise bad_request("request", f"not JSON: {error}", "Send one JSON object.") from error
    if not isinstance(request, dict) or not isinstance(request.get("verb"), str):
        raise bad_request("request", "no object with a verb", "Send one JSON object.")
    return request


def text(request: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Returns a string of the request, for handlers. Raises BadRequest if none, or too long.

    Without a default, the string must be there and must not be empty.
    """
    value = request.get(name, default)
    if not isinstance(value, str) or len(value) > 1024 or not (value or default is not None):
        raise bad_request(name, "not a string of up to 1024 characters", f"Give {name}.")
    return value


def bad_request(about: str, why: str, do: str) -> BadRequest:
    """Returns the error for a bad request. about: the field or verb that is wrong."""
    return BadRequest("cannot do the request", about=about, why=why, do=do)


def refusal(error: QuickthawError) -> bytes:
    """Returns the line that reports `error` to the client."""
    parts = {
        "class": type(error).__name__, "what": error.what, "about": error.about,
        "why": error.why, "do": error.do, "effect": error.effect, "exit_code": error.exit_code,
        "notes": list(getattr(error, "__notes__", ())),
    }  # fmt: skip
    return json.dumps({"error": parts}).encode() + b"\n"
