"""Parsers of the test node: a test that reads its node wrongly proves nothing."""

import tarfile
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.node import logs
from tests.node.images import File, layer_of_files
from tests.node.units import Unit

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n"))


def test_a_unit_is_read_as_systemd_reads_it() -> None:
    text = """
[Unit]
Description=x
ExecStart=/not/this

[Service]
Type=notify
ExecStart=/usr/bin/thing --flag "two words"
# Environment=NOT=this
Environment=A=1 "B=two words"
Environment=C=3
UMask=0077
RuntimeDirectory=thing
StateDirectory=thing other
[Install]
WantedBy=multi-user.target
"""
    assert Unit.parse("thing", text) == Unit(
        name="thing",
        exec_start=("/usr/bin/thing", "--flag", "two words"),
        environment={"A": "1", "B": "two words", "C": "3"},
        notify=True,
        umask=0o077,
        runtime_directories=("thing",),
        state_directories=("thing", "other"),
    )


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.lists(TEXT, min_size=1))))
def test_partial_lines_of_a_log_are_joined(written: list[tuple[str, list[str]]]) -> None:
    raw = [
        f"2026-01-01T00:00:00.000000001Z {stream} {'P' if part < len(parts) - 1 else 'F'} {text}"
        for stream, parts in written
        for part, text in enumerate(parts)
    ]
    parsed = logs.parse("".join(f"{line}\n" for line in raw))
    wanted = [(stream, "".join(parts)) for stream, parts in written]
    assert [(line.stream, line.text) for line in parsed] == wanted


def test_text_that_is_no_container_log_is_refused() -> None:
    with pytest.raises(ValueError, match="not a line"):
        logs.parse("2026-01-01T00:00:00Z stdout X text\n")


def test_a_layer_has_directories_files_and_links() -> None:
    layer = layer_of_files([File("/a/b/c", b"x", 0o755), File("/a/l", link="b/c")])
    with tarfile.open(fileobj=BytesIO(layer)) as tar:
        assert [(each.name, each.type, each.mode) for each in tar][:3] == [
            ("a", tarfile.DIRTYPE, 0o755),
            ("a/b", tarfile.DIRTYPE, 0o755),
            ("a/b/c", tarfile.REGTYPE, 0o755),
        ]
        assert tar.getmember("a/l").linkname == "b/c"
