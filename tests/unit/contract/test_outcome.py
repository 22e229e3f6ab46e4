"""An outcome says the same to its reader as to its writer; damaged bytes are a ValueError."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import outcome
from shim.contract.errors import MemoryLost
from shim.contract.outcome import Outcome
from tests.unit.restore.test_resume import TICKET

if TYPE_CHECKING:
    from pathlib import Path

TEXT = st.text(max_size=5)
SECONDS = st.floats(0, 1e11)
FIELDS: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {"result": st.sampled_from([outcome.RESTORED, outcome.COLD, outcome.KILLED, outcome.REFUSED])},
    optional={
        "snapshot": st.sampled_from(["", "5" * 64]),
        "error": TEXT,
        "error_class": TEXT,
        "exit_code": st.integers(0, 255),
        "refusals": st.lists(TEXT),
        "blame": TEXT,
        "deadline_s": SECONDS,
        "pod": st.fixed_dictionaries(dict.fromkeys(("namespace", "name", "uid", "container"), TEXT))
        | st.just({}),
        "seconds": SECONDS,
        "steps": st.dictionaries(TEXT, SECONDS),
        "warnings": st.lists(TEXT),
        "at": SECONDS,
    },
)


@given(FIELDS)
def test_outcome_survives_writing(fields: dict[str, object]) -> None:
    encoded = Outcome(**fields).encode()
    found = outcome.decode(encoded)
    assert found.encode() == encoded
    assert all(getattr(found, name) == value for name, value in fields.items())


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*Outcome.__slots__, "schema", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_bytes_make_the_outcome_parser_raise_another_error(data: bytes) -> None:
    try:
        found = outcome.decode(data)
    except ValueError:
        return
    assert outcome.decode(found.encode()).encode() == found.encode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"result": "well"},
        {"result": None},
        {"snapshot": "../etc"},
        {"error": 1},
        {"exit_code": True},
        {"exit_code": 256},
        {"refusals": [1]},
        {"refusals": "seccomp"},
        {"deadline_s": -1},
        {"deadline_s": True},
        {"seconds": 10**400},
        {"seconds": "1"},
        {"steps": {"criu": "long"}},
        {"pod": {"name": "p"}},
        {"pod": {"namespace": "n", "name": None, "uid": "u", "container": "c"}},
        {"warnings": [None]},
    ],
)
def test_wrong_value_is_damage(wrong: dict[str, object]) -> None:
    fields = {"schema": 1, "result": "cold"} | wrong
    with pytest.raises(ValueError, match=r"."):
        outcome.decode(json.dumps(fields).encode())


def test_missing_key_is_empty_and_an_unknown_key_is_ignored() -> None:
    found = outcome.decode(b'{"schema": 1, "result": "cold", "of": "a newer version"}')
    assert (found.snapshot, found.pod, found.steps, found.deadline_s) == ("", {}, {}, 0)
    for other in (b'{"schema": 2, "result": "cold"}', b'{"result": "cold"}', b"[]"):
        with pytest.raises(ValueError, match="not an outcome of schema 1"):
            outcome.decode(other)
    with pytest.raises(ValueError, match="unknown keys"):
        Outcome(result=outcome.COLD, reason="a writer's mistake")


def test_an_outcome_is_taken_once(tmp_path: Path) -> None:
    outcome.write("abc", Outcome(result=outcome.COLD), str(tmp_path))
    found = outcome.take("abc", str(tmp_path))
    assert found
    assert found.result == outcome.COLD
    assert outcome.take("abc", str(tmp_path)) is None


def test_damaged_outcome_is_removed(tmp_path: Path) -> None:
    (tmp_path / "abc.json").write_text("torn")
    with pytest.raises(ValueError, match="not JSON"):
        outcome.take("abc", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_killed_swap_has_the_error_and_the_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome.write, "__defaults__", (str(tmp_path),))
    outcome.write_killed(TICKET, MemoryLost("a", about="b", why="c", do="d"), blame="content")
    found = outcome.take(TICKET.container, str(tmp_path))
    assert found
    assert (found.result, found.blame, found.error_class) == ("killed", "content", "MemoryLost")
    assert (found.exit_code, found.pod["uid"]) == (MemoryLost.exit_code, TICKET.pod_uid)
