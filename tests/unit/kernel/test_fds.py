"""A descriptor has a single owner."""

from __future__ import annotations

import os

import pytest

from shim.kernel.fds import OwnedFd


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_leaving_the_with_closes_the_descriptor_once() -> None:
    owned = OwnedFd(os.open("/", os.O_RDONLY))
    with owned:
        fd = owned.fileno()
    assert not _is_open(fd)
    owned.close()
    with pytest.raises(ValueError, match="closed"):
        owned.fileno()


def test_a_stolen_descriptor_stays_open() -> None:
    with OwnedFd(os.open("/", os.O_RDONLY)) as owned:
        fd = owned.steal()
    assert _is_open(fd)
    os.close(fd)
