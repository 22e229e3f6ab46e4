from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cli import client, main, offline, output
from shim.contract.errors import DaemonAway, NoSuchPod, NoSuchSnapshot, SnapshotInUse
from shim.store.listing import listed, shown
from shim.store.store import Store
from tests.unit.manifests import made
from tests.unit.trusting import TrustsAll

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STATUS = {
    "daemon": {
        "pid": 7, "version": "0.1.0", "uptime_s": 3700.0, "containerd": "v2.1.9",
        "nri": {"connected": True, "since": 1.0},
    },
    "containers": [
        {"id": "c1", "pod": "web", "namespace": "models", "container": "server", "state": "cold",
         "snapshot": None, "reason": "no\x1b[2Jsnapshot", "seconds": 65.0},
    ],
    "counters": {"quickthaw_restores_total{}": 3.0},
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(str(tmp_path))
    found.open()
    found._by_id[made().id] = made()
    found.damaged["e" * 64] = "its manifest is gone"
    return found


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, store: Store) -> list[tuple[str, dict[str, Any]]]:
    """Serves a daemon's answers; the list has the received requests."""
    asked: list[tuple[str, dict[str, Any]]] = []
    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "ls": lambda: listed(store, {made().id: ["c1"]}, trust=TrustsAll()),
        "show": lambda: shown(store, made(), {made().id: ["c1"]}, trust=TrustsAll()),
        "capture": lambda: {"id": made().id, "timings": {"frozen": 0.25}},
        "rm": lambda: {"removed": made().id},
        "status": lambda: STATUS,
    }

    def ask(verb: str, **arguments: Any) -> dict[str, Any]:
        asked.append((verb, arguments))
        return answers[verb]()

    monkeypatch.setattr(client, "ask", ask)
    return asked


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, store: Store, tmp_path: Path) -> None:
    def ask(_verb: str, **_arguments: Any) -> dict[str, Any]:
        raise DaemonAway("cannot reach quickthawd", about="s", why="gone", do="Start it.")

    monkeypatch.setattr(client, "ask", ask)
    monkeypatch.setattr(offline, "Store", lambda: Store(str(tmp_path)))
    place = store.snapshots / made().id
    place.mkdir()
    (place / "manifest.json").write_bytes(made().encode())


Capsys = pytest.CaptureFixture[str]


def test_ls_in_a_pipe_is_aligned_text(daemon: object, capsys: Capsys) -> None:
    assert main.main(["ls"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].split()[:4] == ["ID", "NAME", "NAMESPACE", "POD"]
    assert lines[1].split()[:5] == [made().id[:12], "warm", "models", "inference-0", "server"]
    assert (
        len({line.index(word) for line, word in zip(lines, ["STATE", "ready"], strict=False)}) == 1
    )
    assert "its manifest is gone" in told.err


def test_ls_can_be_narrowed_to_a_namespace(daemon: object, capsys: Capsys) -> None:
    assert main.main(["ls", "-n", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"snapshots": []}


@pytest.mark.parametrize("verb", [["ls"], ["show", "x"], ["status"], ["capture", "p"], ["rm", "x"]])
def test_every_verb_prints_json(daemon: object, capsys: Capsys, verb: list[str]) -> None:
    assert main.main([*verb, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_show_prints_the_origin_of_a_snapshot(daemon: object, capsys: Capsys) -> None:
    assert main.main(["show", "warm", "--facts"]) == 0
    told = capsys.readouterr().out
    for part in (
        made().id,
        "models/inference-0 (u-1)",
        "python3 serve.py",
        "4.0 KiB",
        "user",
        "c1",
    ):
        assert part in told


def test_status_prints_daemon_and_containers(daemon: object, capsys: Capsys) -> None:
    assert main.main(["status"]) == 0
    told = capsys.readouterr().out
    for part in ("pid 7", "up 1h1m", "connected", "cold", "1m5s", "quickthaw_restores_total"):
        assert part in told
    assert "\x1b" not in told, "text that a container chose must not reach the terminal raw"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["inference-0"], {"pod": "inference-0"}),
        (["models/inference-0"], {"pod": "inference-0", "namespace": "models"}),
        (["p", "-n", "models", "-c", "s"], {"pod": "p", "namespace": "models", "container": "s"}),
    ],
)
def test_capture_names_a_single_pod(
    daemon: list[tuple[str, dict[str, Any]]], arguments: list[str], asked: dict[str, str]
) -> None:
    assert main.main(["capture", *arguments, "--timeout", "5"]) == 0
    assert daemon == [("capture", {**asked, "within_s": 5.0})]


@pytest.mark.usefixtures("away")
def test_ls_and_show_read_the_store_while_the_daemon_is_down(capsys: Capsys) -> None:
    for verb in (["ls"], ["show", made().id[:12]]):
        assert main.main(verb) == 0
        told = capsys.readouterr()
        assert made().id[:12] in told.out
        assert "read from the store itself" in told.err


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("verb", [["status"], ["capture", "p"], ["rm", "x"]])
def test_other_verbs_report_that_the_daemon_is_down(capsys: Capsys, verb: list[str]) -> None:
    assert main.main(verb) == 60
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("quickthaw: cannot reach quickthawd")


@pytest.mark.usefixtures("away")
def test_an_unknown_snapshot_has_its_own_exit_status(capsys: Capsys) -> None:
    assert main.main(["show", "0000", "--json"]) == NoSuchSnapshot.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["class"] == "NoSuchSnapshot"


def test_errors_of_the_daemon_become_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    def ask(_verb: str, **_arguments: Any) -> dict[str, Any]:
        raise NoSuchPod("cannot capture", about="p", why="no such pod", do="Look.")

    monkeypatch.setattr(client, "ask", ask)
    assert main.main(["capture", "p"]) == NoSuchPod.exit_code
    assert "Traceback" not in capsys.readouterr().err


def test_refused_snapshot_does_not_stop_the_removal_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    def ask(_verb: str, **arguments: Any) -> dict[str, Any]:
        if arguments["id"] == "used":
            raise SnapshotInUse("cannot remove", about="used", why="in use", do="Stop it.")
        return {"removed": arguments["id"]}

    monkeypatch.setattr(client, "ask", ask)
    assert main.main(["rm", "a", "used", "b", "--json"]) == SnapshotInUse.exit_code
    told = json.loads(capsys.readouterr().out)
    assert told == {"removed": ["a", "b"], "refused": [{"snapshot": "used", "why": "in use"}]}


def test_closed_pipe_is_no_error() -> None:
    code = (
        "import sys, os; sys.path.insert(0, '.'); from shim.cli import client, main;"
        "client.ask = lambda verb, **_: {'snapshots': []}; sys.exit(main.main(['ls']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        ended = subprocess.run(
            [sys.executable, "-ISE", "-c", code], stdout=out, stderr=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_terminal_gets_a_table() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        out = output.Output(as_json=False, out=terminal, notes=io.StringIO())
        out.table(("NAME", "WHY"), [("[bold]x", "\x1b[31mred"), ("", "é")])
        terminal.flush()
        came = b""
        while came.count(b"\n") < 3:  # a terminal hands out what has come so far
            came += os.read(ours, 65536)
        told = came.decode()
    os.close(ours)
    assert "[bold]x" in told, "a name is no markup"
    assert "\x1b[31m" not in told
    assert "\\x1b[31mred" in told


@given(st.text())
def test_output_has_no_control_characters_for_a_terminal(text: str) -> None:
    assert output.printable(text).isprintable()


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0s"), (59.9, "59s"), (60, "1m0s"), (7500, "2h5m"), (273600, "3d4h"), (-5, "0s"),
     (None, "-")],
)  # fmt: skip
def test_durations_are_short(seconds: float | None, told: str) -> None:
    assert output.duration(seconds) == told


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 40, "1.0 TiB")]
)
def test_sizes_are_short(count: int, told: str) -> None:
    assert output.size(count) == told


@pytest.mark.parametrize("verb", ["", "ls", "show", "capture", "explain", "rm", "status", "keys"])
def test_help_has_examples(capsys: Capsys, verb: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert "examples:\n  quickthaw" in capsys.readouterr().out
