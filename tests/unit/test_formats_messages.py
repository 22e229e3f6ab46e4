"""docs/formats.md agrees with the code about sockets, pipes and messages."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hook import thaw
from shim.cli import client
from shim.contract.errors import NoSuchSnapshot, QuickthawError
from shim.daemon import control
from shim.daemon.explain import Explaining
from shim.daemon.requests import Requests
from shim.gate import explain
from shim.gate.refusal import Finding
from shim.gpu.direct import wire
from shim.memory.serve import guard, messages, shared
from shim.restore import memory as swap
from shim.store import listing, quarantine
from tests.unit.formatsdoc import (
    DOCUMENT,
    EXAMPLES,
    SECTIONS,
    TEXT,
    inside,
    octets,
    rows,
)
from tests.unit.manifests import made
from tests.unit.trusting import TrustsAll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class _Store(SimpleNamespace):
    """A store with a single snapshot, and its records."""

    def __init__(self) -> None:
        bad = quarantine.Record("why", "X", "restore", 2, 1.0, "quickthawd")
        found = made()
        super().__init__(
            all=lambda: [found], damaged={"d": "why"},
            quarantine=SimpleNamespace(
                get=lambda _: bad, failures=lambda _: 0, all=lambda: {found.id: bad}
            ),
        )  # fmt: skip


def results() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields verb and result, or a row of the result, as the daemon makes them."""
    store: Any = _Store()
    for row in listing.listed(store, None, trust=TrustsAll())["snapshots"]:
        yield "ls", row
    yield "show", listing.shown(store, made(), None, trust=TrustsAll())
    yield "quarantine", listing.quarantined(store)["quarantined"][0]
    reporter: Any = SimpleNamespace(
        metrics=SimpleNamespace(watch=lambda _store: None, counters=dict)
    )  # fmt: skip
    nobody: Any = ()
    watch: Any = SimpleNamespace(as_json=dict)
    requests = Requests(store, TrustsAll(), nobody, nobody, reporter, watch)
    yield "status", asyncio.run(_answer(requests.verbs()["status"]))
    more = {"container": {}, "capture": [], "chosen": "", "quarantine": ""}
    yield "explain", more | explain.nothing()
    error = client.error_of({"class": "NoSuchSnapshot", "what": "cannot find"})
    yield "error", json.loads(control.refusal(error))["error"]


async def _answer(handler: Callable[[Mapping[str, Any]], Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = await handler({})
    return found


def test_control_socket_has_every_field_of_every_answer() -> None:
    for verb, found in results():
        assert inside("Control socket", verb) == set(found), verb
    finding = Finding("code", 1, None, None, False).as_json()
    row = re.search(r"\| `explain.checks` \| list \| (.*) \|", TEXT)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) == {*finding, "compares", "when"}


def test_control_socket_has_every_verb() -> None:
    requests, explaining = object.__new__(Requests), object.__new__(Explaining)
    verbs = {**requests.verbs(), **explaining.verbs()}
    assert set(rows("Control socket", "verb")) == set(verbs)
    assert control.parse(EXAMPLES["request"].encode())["verb"] in verbs


def test_example_of_an_answer_raises_its_error() -> None:
    line = " ".join(EXAMPLES["answer"].splitlines()).encode()
    with pytest.raises(NoSuchSnapshot) as caught:
        client.decode(line)
    assert json.loads(control.refusal(caught.value)) == json.loads(line)


def test_unknown_class_of_an_error_keeps_its_exit_status() -> None:
    found = client.error_of({"class": "NotYetKnown", "what": "w", "exit_code": 77})
    assert isinstance(found, QuickthawError)
    assert found.exit_code == 77


def test_messages_of_the_page_server() -> None:
    section = SECTIONS["Messages of the page server"]
    words = {
        value
        for module in (messages, guard, shared, swap)
        for value in vars(module).values()
        if isinstance(value, bytes) and len(value) == 1
    }
    listed = {each.encode() for each in re.findall(r"^\| `(.)`", section, re.M)}
    assert listed == words
    assert f"{messages.MOST_BYTES:,} octets" in section


def test_messages_of_helpers() -> None:
    section = SECTIONS["Messages of helpers"]
    script = (DOCUMENT.parents[1] / "hook/quickthaw-opened").read_text()
    for name in re.findall(r"opened\.\w+ed", script):
        assert f"`{name}`" in section
    sources = [*DOCUMENT.parents[1].glob("shim/**/*.py"), *DOCUMENT.parents[1].glob("hook/*.py")]
    told = "".join(path.read_text() for path in sources)
    for line in re.findall(r"writes the line `(\w+)`|waits for the line `(\w+)`", section):
        assert any(word and f'b"{word}\\n"' in told for word in line)
    assert f"{thaw.ABANDONED}: it had to thaw" in section
    drivers = (DOCUMENT.parents[1] / "shim/gpu/calls.py").read_text()
    carrier = (DOCUMENT.parents[1] / "shim/gpu/direct/carrier.py").read_text()
    verbs = set(re.findall(r'(?:do|request\["do"\]) == "(\w+)"', drivers))
    verbs |= set(re.findall(r'"(\w+)": self\.', drivers))
    verbs |= set(re.findall(r'case "(\w+)":', carrier))
    assert set(rows("Messages of helpers", "request")) == verbs


def test_messages_of_the_gpu_library() -> None:
    section = SECTIONS["Library of the way direct"]
    kinds = {
        name: value
        for name, value in vars(wire).items()
        if name.isupper() and isinstance(value, int) and 0 < value <= 16 and name != "VERSION"
    }
    listed = {
        name: int(number) for number, name in re.findall(r"^\| (\d+) ([A-Z]+) \|", section, re.M)
    }
    assert listed == kinds
    magic, version, kind, count, value = wire._HEAD.unpack(octets("head"))
    assert (magic, version, kind, count, value) == (wire.MAGIC, wire.VERSION, wire.STATE, 0, 0)
    assert f"`{wire.MAGIC:#x}`" in section
    assert struct.calcsize("<IHHII") == len(octets("head"))
    bits = ", ".join(f"{bit} {word}" for bit, word in enumerate(wire.SEEN))
    assert f"Bits of *seen*: {bits}" in section
