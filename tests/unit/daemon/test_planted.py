"""Files that a container plants where root writes stay the container's, and root does not follow
them.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import journal
from shim.criu import options
from shim.daemon.oneline import OneLine
from shim.oci.spec import Spec
from shim.restore import resume
from tests.unit.manifests import made
from tests.unit.tickets import a_ticket

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the control directory of the container `abc`."""
    monkeypatch.setattr(resume, "CONTROL", str(tmp_path))
    (tmp_path / "abc").mkdir()
    (tmp_path / "target").write_text("untouched")
    return tmp_path / "abc"


def tell() -> None:
    resume.tell(a_ticket(), made(), Spec({}), ["10.0.0.1"])


def as_link(path: Path) -> None:
    path.symlink_to("../target")


def as_hard_link(path: Path) -> None:
    os.link(path.parent.parent / "target", path)


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.mkdir()


PLANTED = [as_link, as_hard_link, as_fifo, as_directory]


@pytest.mark.parametrize("plant", PLANTED[:3])
def test_restored_json_replaces_a_planted_file_and_follows_no_link(
    control: Path, plant: Callable[[Path], None]
) -> None:
    plant(control / "restored.json")
    tell()
    assert (control.parent / "target").read_text() == "untouched"
    assert '"pod": "pod"' in (control / "restored.json").read_text()
    assert not (control / "restored.json").is_symlink()


@pytest.mark.parametrize("plant", PLANTED[:3])
def test_planted_scratch_file_is_replaced_and_stays_unwritten(
    control: Path, plant: Callable[[Path], None]
) -> None:
    plant(control / f".restored.json.{os.getpid()}.new")
    tell()
    assert (control.parent / "target").read_text() == "untouched"
    assert os.listdir(control) == ["restored.json"]


@pytest.mark.parametrize("name", ["restored.json", f".restored.json.{os.getpid()}.new"])
def test_planted_directory_fails_the_swap(control: Path, name: str) -> None:
    as_directory(control / name)
    with pytest.raises(IsADirectoryError):
        tell()
    assert os.listdir(control) == [name]


def test_undo_removes_a_link_and_not_its_target(control: Path) -> None:
    as_link(control / "restored.json")
    resume.untell(a_ticket())
    assert os.listdir(control) == []
    assert (control.parent / "target").read_text() == "untouched"


def test_criu_options_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("untouched")
    (tmp_path / "criu.conf").symlink_to("target")
    with pytest.raises(OSError, match="symbolic"):
        options.write(str(tmp_path / "criu.conf"))
    assert (tmp_path / "target").read_text() == "untouched"


def test_journal_of_an_unknown_change_is_skipped(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal.note(path, "unheard-of", {"target": "/etc"})
    assert list(journal.changes(path)) == [("unheard-of", {"target": "/etc"})]


def line_of(message: str) -> str:
    record = logging.LogRecord("q", logging.WARNING, __file__, 1, "pod %s", (message,), None)
    return OneLine().format(record)


def test_no_value_can_begin_a_new_journal_line() -> None:
    told = line_of("x\nINFO default/pod restored from 0123\r\x1b[2J")
    assert told == "WARNING pod x\\nINFO default/pod restored from 0123\\r\\x1b[2J"


@given(st.text())
def test_every_message_is_a_single_line(text: str) -> None:
    assert line_of(text).isprintable()
