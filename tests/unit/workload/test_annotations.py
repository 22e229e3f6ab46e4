from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract.errors import BadAnnotation
from shim.workload import logregex
from shim.workload.annotations import (
    ANNOTATIONS,
    PREFIX,
    ExecCall,
    ExecReady,
    FileReady,
    HttpCall,
    HttpReady,
    LogReady,
    SignalReady,
    TcpReady,
    Wish,
    parse,
)

NAMES = [row.name for row in ANNOTATIONS]


def wish(container: str = "main", **values: str) -> Wish | None:
    found = {f"{PREFIX}{name.replace('_', '-')}": value for name, value in values.items()}
    return parse(found, container)


def test_pod_without_annotations_has_not_opted_in() -> None:
    assert parse({}, "main") is None
    assert parse({"kubernetes.io/x": "y", "quickthaw.io": "z"}, "main") is None
    assert wish(deadline="5s") is None


def test_opting_in_has_safe_defaults() -> None:
    assert wish(snapshot="auto") == Wish(snapshot="auto", fallback="cold", on_restart="cold")


@pytest.mark.parametrize(
    ("value", "condition"),
    [
        ("http://:8000/health", HttpReady(8000, "/health")),
        ("http://:8000", HttpReady(8000, "/")),
        ("http://:1/a?b=c", HttpReady(1, "/a?b=c")),
        ("tcp://:65535", TcpReady(65535)),
        ("file:/run/ready", FileReady("/run/ready")),
        ("exec:test -e '/a b'", ExecReady(("test", "-e", "/a b"))),
        ("log:serving on .*:[0-9]+", LogReady("serving on .*:[0-9]+")),
        ("signal", SignalReady()),
    ],
)
def test_six_capture_conditions_are_parsed(value: str, condition: object) -> None:
    found = wish(snapshot="auto", capture_when=value)
    assert found is not None
    assert found.capture_when == condition


@pytest.mark.parametrize(
    ("value", "call", "encoded"),
    [
        ("http POST :8000/sleep?level=1", HttpCall("POST", 8000, "/sleep?level=1"),
         "http POST :8000/sleep?level=1"),
        ("http GET :80", HttpCall("GET", 80, "/"), "http GET :80/"),
        ("exec:sync 'a b'", ExecCall(("sync", "a b")), 'exec:["sync", "a b"]'),
    ],
)  # fmt: skip
def test_calls_are_parsed_and_keep_their_form_in_a_ticket(
    value: str, call: object, encoded: str
) -> None:
    found = wish(restore="auto", resume=value, quiesce=value)
    assert found is not None
    assert found.resume == found.quiesce == call
    assert found.resume is not None
    assert found.resume.encode() == encoded
    if isinstance(call, ExecCall):
        assert json.loads(encoded.removeprefix("exec:")) == list(call.argv)


@pytest.mark.parametrize(
    ("value", "seconds"), [("90s", 90), ("1m30s", 90), ("2h", 7200), ("0.5s", 0.5)]
)
def test_deadlines_are_durations(value: str, seconds: float) -> None:
    assert wish(snapshot="auto", deadline=value) == Wish(snapshot="auto", deadline_s=seconds)


@pytest.mark.parametrize("value", ["auto", "warm-1", "sha256:" + "a" * 64, "sha256:" + "0" * 12])
def test_restore_annotation_can_name_a_snapshot_id(value: str) -> None:
    assert wish(restore=value) == Wish(restore=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("snapshot", ""), ("snapshot", "sha256:" + "a" * 64), ("snapshot", "../x"),
        ("snapshot", "/var/lib"), ("snapshot", "Upper"), ("snapshot", "a" * 64),
        ("snapshot", "auto\n"), ("restore", "sha256:abc"), ("restore", "sha256:" + "g" * 64),
        ("restore", "sha256:" + "a" * 65), ("capture-when", "http://example.com:80/"),
        ("capture-when", "http://:0/"), ("capture-when", "http://:65536/"),
        ("capture-when", "http://:80/a b"), ("capture-when", "http://:80/\r\nX: y"),
        ("capture-when", "https://:80/"), ("capture-when", "tcp://:x"), ("capture-when", "tcp://:٣"),
        ("capture-when", "file:relative"), ("capture-when", "exec:"), ("capture-when", "exec:'a"),
        ("capture-when", "exec:a b\0c"), ("capture-when", "log:"), ("capture-when", "log:("),
        ("capture-when", "log:(a+)+$"), ("capture-when", "log:[[a]"), ("capture-when", "Signal"),
        ("capture-when", "log:a{99999999999}"), ("capture-when", "log:" + "(" * 200),
        ("quiesce", "http DELETE :80/"), ("quiesce", "http POST http://x/"), ("quiesce", "sync"),
        ("resume", "exec:''"), ("fallback", "warm"), ("fallback", "Cold"), ("on-restart", "yes"),
        ("deadline", ""), ("deadline", "0s"), ("deadline", "-5s"), ("deadline", "5"),
        ("deadline", "25h"), ("deadline", "٣s"), ("deadline", "1s1m"), ("deadline", "nan"),
        ("capture-when", "exec:" + "x" * 5000),
    ],
)  # fmt: skip
def test_error_of_a_malformed_value_names_the_allowed_values(name: str, value: str) -> None:
    opted_in = {} if name in ("snapshot", "restore") else {f"{PREFIX}snapshot": "auto"}
    with pytest.raises(BadAnnotation) as caught:
        parse({**opted_in, PREFIX + name: value}, "main")
    row = next(row for row in ANNOTATIONS if row.name == name)
    assert PREFIX + name in caught.value.what
    assert caught.value.about == "main"
    assert row.allowed in caught.value.do
    assert "\n" not in str(caught.value), "one line for the journal"
    assert len(str(caught.value)) < 1000


def test_error_of_an_unknown_annotation_names_the_nearest_known() -> None:
    with pytest.raises(BadAnnotation, match=r"Did you mean quickthaw.io/snapshot\?"):
        parse({"quickthaw.io/snapshto": "auto"}, "main")
    with pytest.raises(BadAnnotation, match="There are: snapshot, restore"):
        parse({"quickthaw.io/zzz": "auto"}, "main")


def test_suffix_limits_an_annotation_to_its_container() -> None:
    only = {f"{PREFIX}snapshot.main": "auto", f"{PREFIX}deadline.other": "nonsense"}
    assert parse(only, "main") == Wish(snapshot="auto")
    assert parse({f"{PREFIX}snapshot.main": "auto"}, "other") is None


def test_annotation_with_suffix_wins_over_the_bare_annotation() -> None:
    both = {f"{PREFIX}snapshot": "bare", f"{PREFIX}snapshot.main": "own"}
    assert parse(both, "main") == Wish(snapshot="own")
    assert parse(dict(reversed(both.items())), "main") == Wish(snapshot="own")
    assert parse(both, "other") == Wish(snapshot="bare")


def test_snapshot_and_restore_exclude_each_other() -> None:
    with pytest.raises(BadAnnotation, match="Remove one of the two"):
        wish(snapshot="auto", restore="auto")


def parsed(annotations: dict[str, str]) -> None:
    try:
        found = parse(annotations, "main")
    except BadAnnotation:
        return
    assert found is None or isinstance(found, Wish)
    if found is not None and found.resume is not None:
        found.resume.encode()


KEYS = st.sampled_from(NAMES).map(lambda name: PREFIX + name) | st.text().map(
    lambda rest: PREFIX + rest
)
STARTS = [
    "",
    "http://:80/",
    "http POST :80/",
    "tcp://:",
    "file:/",
    "exec:",
    "log:",
    "sha256:",
    "1m",
]


@given(st.dictionaries(KEYS, st.builds(str.__add__, st.sampled_from(STARTS), st.text())))
def test_parse_raises_only_its_documented_error(annotations: dict[str, str]) -> None:
    parsed(annotations)


@given(st.text(alphabet="ab(|)*+?{1,}[^]\\dw.$", max_size=40))
def test_no_regular_expression_breaks_parse(pattern: str) -> None:
    parsed({f"{PREFIX}snapshot": "auto", f"{PREFIX}capture-when": f"log:{pattern}"})


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$", "((a+))*b", "(a?){20}a{20}", r"(a)\1", "(?P<x>a)(?P=x)", "a*a*a*a*b",
     "(?:a{1,9})+b", "(a*)*", "x" * 300, "a?" * 30 + "a" * 30, "(a|a)" * 20],
)  # fmt: skip
def test_slow_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"repeat|back ref|1 to 256"):
        logregex.checked(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["Uvicorn running", r"ready in [0-9.]+ ?s$", "(model|engine) loaded", r"\(done\)*", "[(a+)+]",
     "a{3}", r"(abc)+", "[]a|]+x", "(?i)ready", "(?:a)(?:b)(?:c)(?:d)(?:e)(?:f)" * 2,
     ".*?x.*?y"],
)  # fmt: skip
def test_usual_regular_expression_is_accepted(pattern: str) -> None:
    assert logregex.checked(pattern) == pattern


@given(st.text(alphabet="a(|)*+?{2,}.", min_size=1, max_size=12))
def test_accepted_regular_expression_is_not_slow(pattern: str) -> None:
    try:
        found = re.compile(logregex.checked(pattern))
    except ValueError:
        return
    began = time.monotonic()
    found.search("a" * 40 + "!")
    assert time.monotonic() - began < 0.5, "an exponential one takes days here"
