"""A ticket is root's alone, and for a single container; no bytes break the parser."""

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import errors, ticket
from tests.unit.tickets import a_ticket


def test_ticket_survives_writing_and_belongs_to_root_alone(tmp_path: Path) -> None:
    ticket.write(a_ticket(), str(tmp_path))
    path = tmp_path / "abc.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ticket.read("abc", str(tmp_path)).encode() == a_ticket().encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["abc.json"]


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o602])
def test_a_ticket_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    ticket.write(a_ticket(), str(tmp_path))
    (tmp_path / "abc.json").chmod(mode)
    with pytest.raises(errors.TicketUnreadable, match="not a file of root alone"):
        ticket.read("abc", str(tmp_path))


def test_a_planted_link_is_no_ticket(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(a_ticket().encode())
    (tmp_path / "abc.json").symlink_to("elsewhere")
    with pytest.raises(errors.TicketUnreadable):
        ticket.read("abc", str(tmp_path))


def test_a_ticket_of_another_container_is_refused(tmp_path: Path) -> None:
    ticket.write(a_ticket(container="other"), str(tmp_path))
    (tmp_path / "other.json").rename(tmp_path / "abc.json")
    with pytest.raises(errors.TicketUnreadable, match="the ticket is for other"):
        ticket.read("abc", str(tmp_path))


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.sampled_from([*a_ticket().__slots__, "schema", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_bytes_make_the_ticket_parser_raise_another_error(data: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        ticket.decode(data)
