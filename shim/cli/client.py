"""Sends a request to the control socket, and returns the answer or raises the daemon's error."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from shim.contract import errors, jsontext
from shim.contract.errors import DaemonAway, QuickthawError
from shim.contract.paths import SOCKET

if TYPE_CHECKING:
    from collections.abc import Mapping

ANSWER_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024


def ask(
    verb: str, *, path: str = SOCKET, within_s: float = ANSWER_S, **arguments: object
) -> dict[str, Any]:
    """Returns the daemon's answer to a request.

    Raises DaemonAway when no answer comes within `within_s` seconds, and the daemon's error.
    """
    request = json.dumps({"verb": verb, **arguments}).encode() + b"\n"
    try:
        line = _exchange(request, path, time.monotonic() + within_s)
    except TimeoutError as error:
        raise _away(path, f"no answer within {within_s:g} s", _RESTART) from error
    except PermissionError as error:
        raise _away(path, str(error.strerror), "Run it as root.") from error
    except OSError as error:
        raise _away(path, str(error.strerror or error), _START) from error
    return decode(line, path)


_START = "Start it: systemctl start quickthawd."
_RESTART = "See `systemctl status quickthawd`."


def decode(line: bytes, path: str = SOCKET) -> dict[str, Any]:
    """Returns the result in an answer. Raises the error in the answer, or DaemonAway if neither."""
    try:
        answer = jsontext.parse(line)
    except ValueError as error:
        raise _away(path, f"it gave no answer: {line[:40]!r}", _RESTART) from error
    if isinstance(answer, dict) and isinstance(answer.get("result"), dict):
        result: dict[str, Any] = answer["result"]
        return result
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        raise error_of(answer["error"])
    raise _away(path, "its answer is not in the daemon's protocol", _RESTART)


def error_of(parts: Mapping[str, Any]) -> QuickthawError:
    """Returns the error that the daemon reported, as an instance of the error's class."""
    told = {name: str(parts.get(name, "")) for name in ("what", "about", "why", "do")}
    error = _class_of(parts)(told.pop("what"), **told)
    notes = parts.get("notes")
    for note in notes if isinstance(notes, list) else ():
        error.add_note(str(note))
    return error


def _class_of(parts: Mapping[str, Any]) -> type[QuickthawError]:
    name = str(parts.get("class", ""))
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, QuickthawError):
        return known
    code = parts.get("exit_code")
    told = {"effect": str(parts.get("effect", "")), "exit_code": code if _is_status(code) else 1}
    # The daemon is newer than we are, or raised a class that is no contract.
    return type("QuickthawError", (QuickthawError,), told)


def _is_status(code: object) -> bool:
    return isinstance(code, int) and not isinstance(code, bool) and 0 < code < 126


def _exchange(request: bytes, path: str, until: float) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_left(until))
        connection.connect(path)
        with contextlib.suppress(BrokenPipeError):  # refused unread: the answer says why
            connection.sendall(request)
        answer = bytearray()
        while not answer.endswith(b"\n") and len(answer) <= MAX_ANSWER_BYTES:
            connection.settimeout(_left(until))
            if not (data := connection.recv(_CHUNK_BYTES)):
                break
            answer += data
        return bytes(answer)


def _left(until: float) -> float:
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _away(path: str, why: str, do: str) -> DaemonAway:
    return DaemonAway("cannot reach quickthawd", about=path, why=why, do=do)
