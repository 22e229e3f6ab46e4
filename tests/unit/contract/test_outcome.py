"""The outcome of a swap reaches the daemon once."""

from pathlib import Path

from shim.contract import outcome


def test_an_outcome_is_taken_once(tmp_path: Path) -> None:
    outcome.write("abc", {"result": outcome.COLD}, str(tmp_path))
    assert outcome.take("abc", str(tmp_path)) == {"schema": 1, "result": "cold"}
    assert outcome.take("abc", str(tmp_path)) is None
