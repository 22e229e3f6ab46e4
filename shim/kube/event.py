"""Kubernetes events of quickthaw: what is told, and when it is the same thing again. Pure.

Source: the Kubernetes API reference, Event v1 core, and its validation: reason at most 128
characters in CamelCase, message at most 1,024, names those of a DNS subdomain.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

COMPONENT: Final = "quickthaw"
NORMAL, WARNING = "Normal", "Warning"
MESSAGE_BYTES: Final = 1024
_NAME_CHARS: Final = 253
_REASON_CHARS: Final = 128
_REMEMBERED: Final = 1024
_PODS: Final = 4096


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a pod. container: its name, or empty for all of the pod."""

    namespace: str
    pod: str
    uid: str
    container: str
    kind: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Known:
    """An event that the API server has. first: unix time of the first of `count`."""

    name: str
    first: float
    count: int


def shortened(text: str, most_bytes: int) -> str:
    """At most so many bytes of UTF-8, with an ellipsis where something was left out."""
    raw = text.encode(errors="replace")
    if len(raw) <= most_bytes:
        return raw.decode()
    return raw[: most_bytes - 3].decode(errors="ignore") + "…"


def camel(reason: str) -> str:
    """A reason of our own as Kubernetes wants them: `no-such snapshot` is NoSuchSnapshot."""
    words = "".join(char if char.isascii() and char.isalnum() else " " for char in reason).split()
    return "".join(word[0].upper() + word[1:] for word in words)[:_REASON_CHARS] or "Unknown"


def stamp(at: float) -> str:
    """Unix time as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def body(event: Event, known: Known, node: str, at: float) -> dict[str, Any]:
    """The object for POST."""
    involved = {
        "apiVersion": "v1", "kind": "Pod", "namespace": event.namespace, "name": event.pod,
        "uid": event.uid,
    }  # fmt: skip
    if event.container:
        involved["fieldPath"] = f"spec.containers{{{event.container}}}"
    return {
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": known.name, "namespace": event.namespace},
        "involvedObject": involved, "type": event.kind, "reason": camel(event.reason),
        "message": shortened(event.message, MESSAGE_BYTES),
        "source": {"component": COMPONENT, "host": node},
        "firstTimestamp": stamp(known.first), "lastTimestamp": stamp(at), "count": known.count,
        "reportingComponent": COMPONENT, "reportingInstance": shortened(node, 128),
    }  # fmt: skip


def patch(event: Event, known: Known, at: float) -> dict[str, Any]:
    """What PATCH changes of an event that is there."""
    return {
        "count": known.count, "lastTimestamp": stamp(at),
        "message": shortened(event.message, MESSAGE_BYTES),
    }  # fmt: skip


def name_of(event: Event, at: float) -> str:
    """A name that no other event of the pod has, like those of Kubernetes' own components."""
    ending = f".{int(at * 1e9):x}"
    return event.pod[: _NAME_CHARS - len(ending)].rstrip(".-") + ending


class Memory:
    """Which events the server has, so that the same again is a count and not one more."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], Known] = OrderedDict()

    def again(self, event: Event) -> Known | None:
        """The event that is there already, with one more counted."""
        known = self._known.get(_same(event))
        return Known(known.name, known.first, known.count + 1) if known else None

    def remember(self, event: Event, known: Known) -> None:
        """The server took it."""
        self._known[_same(event)] = known
        self._known.move_to_end(_same(event))
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, event: Event) -> None:
        """The server has it no more: it keeps events for an hour."""
        self._known.pop(_same(event), None)


def _same(event: Event) -> tuple[str, ...]:
    """Messages have ids and times in them: the same reason for the same container is the same."""
    return event.namespace, event.pod, event.uid, event.container, event.kind, event.reason


class Rate:
    """A bucket of tokens for each pod: `burst` at once, then one each `refill_s`."""

    def __init__(self, *, burst: int = 10, refill_s: float = 60.0) -> None:
        self._burst, self._refill_s = burst, refill_s
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, pod: str, now: float) -> bool:
        """Take a token for this pod if there is one. now: of a monotonic clock."""
        tokens, since = self._left.get(pod, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) / self._refill_s)
        allowed = tokens >= 1
        self._left[pod] = (tokens - allowed, now)
        self._left.move_to_end(pod)
        while len(self._left) > _PODS:
            self._left.popitem(last=False)
        return allowed
