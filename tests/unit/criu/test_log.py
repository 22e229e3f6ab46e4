"""Of CRIU's and runc's logs a single sentence is left: the cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.criu.log import first_error, was_cut

if TYPE_CHECKING:
    from pathlib import Path

RLIMIT = (
    "(00.000020) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: "
    "Operation not permitted\n"
)
RUNC = (
    '{"level":"warning","msg":"no cgroup","time":"t"}\n'
    '{"level":"error","msg":"criu failed: type NOTIFY","time":"t"}\n'
)


def _cause(directory: Path, *, criu: str = "", runc: str = "") -> str:
    (directory / "dump.log").write_text(criu)
    (directory / "runc.log").write_text(runc)
    return first_error(str(directory), "dump.log")


def test_the_first_error_of_criu_is_the_cause(tmp_path: Path) -> None:
    log = (
        "(00.1) Warn  (criu/net.c:1): a warning\n"
        "(00.2)     13: Error (criu/files-reg.c:9): Can't open file x: No such file\n"
        "(00.3) Error (criu/cr-restore.c:1): Restoring FAILED.\n"
    )
    assert _cause(tmp_path, criu=log, runc=RUNC) == "criu: Can't open file x: No such file"


def test_error_that_criu_survives_is_no_cause(tmp_path: Path) -> None:
    log = RLIMIT + "(00.2) Error (criu/sockets.c:7): Can't get 1:16 opt\n"
    assert _cause(tmp_path, criu=log) == "criu: Can't get 1:16 opt"
    assert _cause(tmp_path, criu=RLIMIT, runc=RUNC) == "runc: criu failed: type NOTIFY"


def test_without_an_error_of_criu_the_last_error_of_runc_is_the_cause(tmp_path: Path) -> None:
    (tmp_path / "runc.log").write_text(RUNC + "not json\n[]\n")
    assert first_error(str(tmp_path), "dump.log") == "runc: criu failed: type NOTIFY"


def test_missing_logs_are_reported_in_words(tmp_path: Path) -> None:
    assert str(tmp_path) in first_error(str(tmp_path), "restore.log")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_no_bytes_in_a_log_raise_an_error(tmp_path: Path, criu: bytes, runc: bytes) -> None:
    (tmp_path / "dump.log").write_bytes(criu)
    (tmp_path / "runc.log").write_bytes(runc)
    assert first_error(str(tmp_path), "dump.log")


def test_dump_that_does_not_report_its_end_was_cut(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    assert was_cut(str(tmp_path)), "CRIU did not even begin"
    begun = "(00.1) Putting parasite blob into 0x7f\n" * 300_000
    for last, cut in (("", True), ("Error: Dumping FAILED.\n", False),
                      ("Dumping finished successfully\n", False)):  # fmt: skip
        log.write_text(begun + last)
        assert was_cut(str(tmp_path)) == cut
