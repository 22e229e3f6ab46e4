"""Logs of failed restores: the kept part of a log, and the limit of all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.restore import logs

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_beginning_and_end_of_a_long_log_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "restore.log"
    log.write_bytes(b"begin" + b"x" * (8 << 20) + b"Error: end")
    kept = logs.keep(str(log), "a" * 64, str(tmp_path))
    with open(kept, "rb") as file:
        content = file.read()
    assert content.startswith(b"begin")
    assert content.endswith(b"Error: end")
    assert len(content) < 1100 << 10
    assert os.stat(kept).st_mode & 0o777 == 0o600


def test_short_log_is_kept_whole_and_a_missing_log_gives_none(tmp_path: Path) -> None:
    log = tmp_path / "restore.log"
    assert logs.keep(str(log), "a" * 64, str(tmp_path)) == ""
    log.write_bytes(b"short")
    with open(logs.keep(str(log), "a" * 64, str(tmp_path)), "rb") as file:
        assert file.read() == b"short"


def test_oldest_logs_are_removed_beyond_the_limit_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 100)
    place = tmp_path / "logs"
    place.mkdir()
    log = tmp_path / "restore.log"
    log.write_bytes(b"x" * 30)
    for number in range(6):
        kept = logs.keep(str(log), f"{number}", str(place))
        os.utime(kept, (number, number))
    assert sorted(path.stem for path in place.iterdir()) == ["3", "4", "5"]
    logs.keep(str(log), "4", str(place))  # the snapshot's own earlier log does not count
    assert len(list(place.iterdir())) == 3
