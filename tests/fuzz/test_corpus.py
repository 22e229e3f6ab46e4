"""Keeps found faults found, in seconds, and searches a little further each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_everything_in_the_corpus_is_parsed_or_refused(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs, "a target without a corpus begins with nothing: see tests/fuzz/seeds.py"
    for path in inputs:
        TARGETS[name](path.read_bytes())


@st.composite
def damaged(draw: st.DrawFn, inputs: list[bytes]) -> bytes:
    """Returns an input of the corpus with a few pieces replaced, repeated or removed."""
    data = bytearray(draw(st.sampled_from(inputs)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        piece = draw(
            st.binary(max_size=8) | st.sampled_from(WORDS) | st.just(bytes(data[start:end]))
        )
        data[start:end] = piece
    return bytes(data)


WORDS = [b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"9" * 30, b"[" * 2000]


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_damaged_input_is_parsed_or_refused(name: str, data: st.DataObject) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).glob("seed-*"))]
    TARGETS[name](data.draw(damaged(inputs)))
