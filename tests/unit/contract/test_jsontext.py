"""Our JSON equals the json module's, except for texts that are not JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import jsontext

TEXTS = st.text() | st.text(st.characters())
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)  # fmt: skip


@given(VALUES)
def test_written_text_equals_json_and_is_read_again(value: Any) -> None:
    assert jsontext.compose(value) == json.dumps(value)
    ordered = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    assert jsontext.canonical(value) == ordered
    assert jsontext.parse(jsontext.compose(value)) == value
    assert jsontext.parse(json.dumps(value, indent=1).encode() + b"\n") == value


@given(st.text(st.sampled_from('{}[]:,"\\\\ntrue-0.1eE u00d8\t\x01')) | TEXTS)
def test_same_texts_as_json_are_accepted(text: str) -> None:
    try:
        expected = json.loads(text, parse_constant=int)  # NaN and Infinity: a ValueError
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            jsontext.parse(text)
    else:
        assert jsontext.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "NaN", "[Infinity]", "-Infinity", "1 2", "[1] x", "{'a': 1}", b"\xff", "[" * 200_000,
     b'"\x00a"', "\ufeff1"],
)  # fmt: skip
def test_text_that_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        jsontext.parse(text)


def test_value_that_json_lacks_is_not_written() -> None:
    for value in (float("nan"), [float("inf")], -float("inf")):
        with pytest.raises(ValueError, match="no number"):
            jsontext.compose(value)
    for strange in ({1: 2}, {None: 2}, b"bytes", {1, 2}, object()):
        with pytest.raises(TypeError):
            jsontext.compose(strange)
    deep: list[object] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep"):
        jsontext.canonical(deep)
    while deep:  # else its end would be as deep
        (deep,) = deep  # type: ignore[assignment]
