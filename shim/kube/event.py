"""Composes Kubernetes events of quickthaw, and finds whether an event repeats another. Pure.

Source: the Kubernetes API reference, Event v1 core, and its validation: reason at most 128
characters in CamelCase, message at most 1,024, names as of a DNS subdomain.
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
class PodEvent:
    """An event of a pod. container: its name, or empty when the event is about the whole pod."""

    namespace: str
    pod: str
    uid: str
    container: str
    kind: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Known:
    """An event that the API server has. first: unix time of the first of `count` occurrences."""

    name: str
    first: float
    count: int


def shortened(text: str, most_bytes: int) -> str:
    """Returns at most `most_bytes` bytes of UTF-8, with an ellipsis when the text was cut."""
    raw = text.encode(errors="replace")
    if len(raw) <= most_bytes:
        return raw.decode()
    return raw[: most_bytes - 3].decode(errors="ignore") + "…"


def camel(reason: str) -> str:
    """Returns a reason in the form of Kubernetes: `no-such snapshot` becomes NoSuchSnapshot."""
    words = "".join(char if char.isascii() and char.isalnum() else " " for char in reason).split()
    return "".join(word[0].upper() + word[1:] for word in words)[:_REASON_CHARS] or "Unknown"


def stamp(at: float) -> str:
    """Returns a unix time in the form of the API."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def body(event: PodEvent, known: Known, node: str, at: float) -> dict[str, Any]:
    """Returns the body of a POST, which creates the event."""
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


def patch(event: PodEvent, known: Known, at: float) -> dict[str, Any]:
    """Returns the body of a PATCH, which updates an event that the server has."""
    return {
        "count": known.count, "lastTimestamp": stamp(at),
        "message": shortened(event.message, MESSAGE_BYTES),
    }  # fmt: skip


def name_of(event: PodEvent, at: float) -> str:
    """Returns a name that no other event of the pod has, formed as by Kubernetes itself."""
    ending = f".{int(at * 1e9):x}"
    return event.pod[: _NAME_CHARS - len(ending)].rstrip(".-") + ending


class EventMemory:
    """Remembers the events that the server has, so that a repeated event raises a count."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], Known] = OrderedDict()

    def again(self, event: PodEvent) -> Known | None:
        """Returns the event that the server has already, with a raised count; None without one."""
        known = self._known.get(_same(event))
        return Known(known.name, known.first, known.count + 1) if known else None

    def remember(self, event: PodEvent, known: Known) -> None:
        """Remember that the server has accepted an event."""
        self._known[_same(event)] = known
        self._known.move_to_end(_same(event))
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, event: PodEvent) -> None:
        """Forget an event that the server has no longer: it keeps events for an hour."""
        self._known.pop(_same(event), None)


def _same(event: PodEvent) -> tuple[str, ...]:
    """Returns a key for equal events, without the message, which contains ids and times."""
    return event.namespace, event.pod, event.uid, event.container, event.kind, event.reason


class Rate:
    """Limits events by a token bucket per pod: `burst` at once, then a token each `refill_s`."""

    def __init__(self, *, burst: int = 10, refill_s: float = 60.0) -> None:
        self._burst, self._refill_s = burst, refill_s
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, pod: str, now: float) -> bool:
        """Take a token for this pod; False when there is none. now: of a monotonic clock."""
        tokens, since = self._left.get(pod, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) / self._refill_s)
        allowed = tokens >= 1
        self._left[pod] = (tokens - allowed, now)
        self._left.move_to_end(pod)
        while len(self._left) > _PODS:
            self._left.popitem(last=False)
        return allowed
