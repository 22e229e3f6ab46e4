"""Fixtures of several test modules."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.gpuscene import Built, Scene


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    with tempfile.TemporaryDirectory(prefix="qt") as at:
        yield Built(Path(at))


@pytest.fixture
def scene(tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, built, monkeypatch)
