"""The journal undoes changes after any death of the process that made them."""

from pathlib import Path

from shim.contract import journal


def test_journal_is_read_backwards_and_a_torn_line_is_ignored(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal.note(path, journal.ROOTFS, {"a": 1})
    journal.note(path, journal.SHM, ["b"])
    with open(path, "a") as file:
        file.write('["address", "10.')
    assert list(journal.changes(path)) == [("shm", ["b"]), ("rootfs", {"a": 1})]
    assert list(journal.changes(str(tmp_path / "none"))) == []


def test_a_swap_under_way_is_seen_by_others(tmp_path: Path) -> None:
    with journal.lock(str(tmp_path)):
        assert journal.is_locked(str(tmp_path))
    assert not journal.is_locked(str(tmp_path))
    assert not journal.is_locked(str(tmp_path / "none"))
