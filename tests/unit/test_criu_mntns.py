"""What a killed CRIU leaves in /tmp."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.criu import mntns


@pytest.fixture
def left() -> Iterator[Path]:
    directory = Path(f"/tmp/.criu.mntns.{secrets.token_hex(3)}")  # noqa: S108 - where CRIU has it
    directory.mkdir()
    yield directory
    if directory.exists():
        directory.rmdir()


def log_with(directory: Path, text: str) -> str:
    log = directory / "restore.log"
    log.write_text(f"(00.020910) cg: Set 1 is root one\n{text}")
    return str(log)


def test_the_directory_that_the_log_names_is_removed(tmp_path: Path, left: Path) -> None:
    log = log_with(tmp_path, f"(00.020913) mnt: \t\tWill mount 339 @ {left}/mnt-0000000339 /sys\n")
    mntns.remove(log)
    assert not left.exists()
    mntns.remove(log)


def test_other_directories_stay(tmp_path: Path, left: Path) -> None:
    mntns.remove(log_with(tmp_path, f"{left}\n{left}x/mnt-0\n/x{left}-mnt-0\n"))
    mntns.remove(str(tmp_path / "none"))
    assert left.exists()
