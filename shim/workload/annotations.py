"""Parses the annotations of a pod's author: one table for parsing, documentation and errors.

A value applies to every container of the pod, or with the suffix `.CONTAINER` to that container. An
annotation names snapshots, never paths. Parsing is pure and total: a Wish, None, or BadAnnotation.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shim.contract.errors import BadAnnotation
from shim.contract.names import is_snapshot_name
from shim.workload import logregex

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX: Final = "quickthaw.io/"
_MAX_LENGTH = 4096
_MOST_NAME_CHARS = 63
_MOST_WANTED = 16
"""Snapshots that a single pod can have read ahead."""
_DURATION = re.compile(r"(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6}(?:\.[0-9]{1,3})?)s)?")
_HTTP = re.compile(r"http://:([0-9]{1,5})(/[!-~]*)?")
_TCP = re.compile(r"tcp://:([0-9]{1,5})")
_CALL = re.compile(r"http (GET|POST|PUT) :([0-9]{1,5})(/[!-~]*)?")
_ID = re.compile(r"sha256:[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class HttpReady:
    """Ready when GET answers with a status from 200 to 399."""

    port: int
    path: str


@dataclass(frozen=True, slots=True)
class TcpReady:
    """Ready when the port accepts connections."""

    port: int


@dataclass(frozen=True, slots=True)
class FileReady:
    """Ready when the file exists in the container."""

    path: str


@dataclass(frozen=True, slots=True)
class ExecReady:
    """Ready when the command, run in the container, exits with 0."""

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LogReady:
    """Ready when a line of the container's log has a match."""

    pattern: str


@dataclass(frozen=True, slots=True)
class SignalReady:
    """Ready when the workload has written `ready` in its control directory."""


Readiness = HttpReady | TcpReady | FileReady | ExecReady | LogReady | SignalReady


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A request to the workload."""

    method: str
    port: int
    path: str

    def encode(self) -> str:
        """Returns the call as a ticket has it."""
        return f"http {self.method} :{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class ExecCall:
    """A command, run in the container."""

    argv: tuple[str, ...]

    def encode(self) -> str:
        """Returns the call as a ticket has it."""
        return f"exec:{json.dumps(self.argv)}"


Call = HttpCall | ExecCall


@dataclass(frozen=True, slots=True)
class Wish:
    """The wish of the pod's author for a container.

    snapshot, restore: `auto`, a name, an id, or empty; exactly one is set. deadline_s: 0 for the
    node's default.
    """

    snapshot: str = ""
    restore: str = ""
    capture_when: Readiness | None = None
    quiesce: Call | None = None
    resume: Call | None = None
    fallback: str = "cold"
    deadline_s: float = 0
    on_restart: str = "cold"
    volume_content: str = "compare"
    gpu: str = "driver"


def _port(text: str) -> int:
    if not 0 < int(text) < 65536:
        raise ValueError(f"{text} is no port")
    return int(text)


def _argv(text: str) -> tuple[str, ...]:
    argv = tuple(shlex.split(text))
    if not argv or not all(argv[:1]):
        raise ValueError("the command is empty")
    if any("\0" in argument for argument in argv):
        raise ValueError("an argument has a zero byte")
    return argv


def snapshot_name(value: str) -> str:
    """Accepts `auto` or a name."""
    if not is_snapshot_name(value):
        raise ValueError("not a name of up to 63 lower case letters, digits, '.', '_', '-'")
    return value


def snapshot_or_id(value: str) -> str:
    """Accepts `auto`, a name, or an id."""
    return value if _ID.fullmatch(value) else snapshot_name(value)


def readiness(value: str) -> Readiness:
    """Accepts the six conditions."""
    kind, _, rest = value.partition(":")
    if match := _HTTP.fullmatch(value):
        return HttpReady(_port(match[1]), match[2] or "/")
    if match := _TCP.fullmatch(value):
        return TcpReady(_port(match[1]))
    if kind == "file" and rest.startswith("/") and "\0" not in rest:
        return FileReady(rest)
    if kind == "exec":
        return ExecReady(_argv(rest))
    if kind == "log":
        return LogReady(logregex.checked(rest))
    if value == "signal":
        return SignalReady()
    raise ValueError("not a condition")


def workload_call(value: str) -> Call:
    """Accepts a request or a command."""
    if match := _CALL.fullmatch(value):
        return HttpCall(match[1], _port(match[2]), match[3] or "/")
    if value.startswith("exec:"):
        return ExecCall(_argv(value.removeprefix("exec:")))
    raise ValueError("not a call")


def one_of(*allowed: str) -> Callable[[str], str]:
    """Returns a parser that accepts these words."""

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"not one of {', '.join(allowed)}")
        return value

    return parse


def duration_s(value: str) -> float:
    """Accepts a duration as Kubernetes writes it: 90s, 1m30s, 2h."""
    match = _DURATION.fullmatch(value)
    if not value or match is None:
        raise ValueError("not a duration")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    if not 0 < (total := hours * 3600 + minutes * 60 + seconds) <= 86400:
        raise ValueError("not between 0 and 24h")
    return total


@dataclass(frozen=True, slots=True)
class Annotation:
    """A row of the table. allowed: the values, for error messages and the documentation."""

    name: str
    parse: Callable[[str], object]
    allowed: str
    help: str

    @property
    def field(self) -> str:
        """Returns the name of the field of Wish."""
        return {"deadline": "deadline_s"}.get(self.name, self.name.replace("-", "_"))


ANNOTATIONS: Final = (
    Annotation("snapshot", snapshot_name, "auto, or a name",
               "restore from a matching snapshot; without one start cold, and capture when ready"),
    Annotation("restore", snapshot_or_id, "auto, a name, or sha256:…",
               "restore only, never capture"),
    Annotation("capture-when", readiness,
               "http://:8000/health, tcp://:8000, file:/run/ready, exec:cmd, log:regex, or signal",
               "the sign that the container is ready to be captured"),
    Annotation("quiesce", workload_call, "http POST :8000/sleep?level=1, or exec:cmd",
               "the call before a capture"),
    Annotation("resume", workload_call, "http POST :8000/wake_up, or exec:cmd",
               "the call after a restore, and after a capture on the source"),
    Annotation("fallback", one_of("cold", "fail"), "cold, or fail",
               "the start of a container whose swap failed"),
    Annotation("deadline", duration_s, "a duration such as 90s or 1m30s",
               "the time limit of the whole swap"),
    Annotation("on-restart", one_of("cold", "restore"), "cold, or restore",
               "the start of a container that restarts"),
    Annotation("volume-content", one_of("compare", "ignore"), "compare, or ignore",
               "whether a Secret or ConfigMap volume that holds something else than the captured "
               "one is a reason against a restore"),
    Annotation("gpu", one_of("driver", "direct"), "driver, or direct",
               "how device memory travels; direct preloads a library into the container, and is "
               "many times faster"),
)  # fmt: skip
_BY_NAME: Final = {row.name: row for row in ANNOTATIONS}
_NAMING: Final = ("snapshot", "restore")


def parse(annotations: Mapping[str, str], container: str) -> Wish | None:
    """Returns the pod's wish for `container`; None when the pod did not opt in.

    Raises BadAnnotation for a name or value that no row allows.
    """
    chosen: dict[str, tuple[str, str]] = {}
    ours = [full for full in annotations if full.startswith(PREFIX)]
    for full in sorted(ours):
        value = annotations[full]
        name, _, only = full.removeprefix(PREFIX).partition(".")
        if name not in _BY_NAME:
            raise _bad(full, value, container, "there is no such annotation", _near(name))
        if only == container or (not only and name not in chosen):
            chosen[name] = (full, value)
    if not chosen:
        return None
    fields = {_BY_NAME[name].field: _value(_BY_NAME[name], *chosen[name], container)
              for name in chosen}  # fmt: skip
    if not fields.keys() & {"snapshot", "restore"}:
        return None  # the other annotations alone wish for nothing
    if fields.keys() >= {"snapshot", "restore"}:
        raise _bad(*chosen["restore"], container, "snapshot is set, too", "Remove one of the two.")
    return Wish(**fields)  # type: ignore[arg-type] # each row's parser gives its field's type


def _value(row: Annotation, full: str, value: str, container: str) -> object:
    if len(value) > _MAX_LENGTH:
        raise _bad(
            full, f"{value[:20]}…", container, "the value is too long", f"Write {row.allowed}."
        )
    try:
        return row.parse(value)
    except ValueError as error:
        raise _bad(full, value, container, str(error), f"Write {row.allowed}.") from error


def _bad(full: str, value: str, container: str, why: str, do: str) -> BadAnnotation:
    return BadAnnotation(
        f"annotation {full:.200}: {value!r:.200}", about=container, why=f"{why:.300}", do=do
    )


def _near(name: str) -> str:
    near = difflib.get_close_matches(name[:_MOST_NAME_CHARS], _BY_NAME, 1)
    return f"Did you mean {PREFIX}{near[0]}?" if near else f"There are: {', '.join(_BY_NAME)}."


def wanted(annotations: Mapping[str, str]) -> list[str]:
    """Returns the snapshots (names, ids, `auto`) that a pod's annotations name for any container.

    Leaves out malformed values, whose errors are reported when the container is created.
    """
    found: list[str] = []
    for key, value in annotations.items():
        if len(found) == _MOST_WANTED:
            break
        name = key.removeprefix(PREFIX).partition(".")[0]
        if key.startswith(PREFIX) and name in _NAMING and value not in found:
            try:
                _BY_NAME[name].parse(value)
            except ValueError:
                continue
            found.append(value)
    return found
