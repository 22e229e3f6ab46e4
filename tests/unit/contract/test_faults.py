"""Fault points: each where the table says, armed by root alone, and nothing at all when unarmed."""

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
import timeit
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.contract import faults

ROOT = Path(__file__).parents[3]
UNARMED_AT_MOST_NS = 1000
"""A call of a function with two arguments costs about a tenth of this bound."""


@pytest.fixture(autouse=True)
def nothing_armed() -> Iterator[None]:
    yield
    faults.disarm()


def armed_with(**fields: object) -> list[str]:
    return faults.arm(json.dumps({"faults": [fields]}))


def points_in_source() -> Counter[str]:
    """Returns first arguments of the calls of `faults.point`, and of callbacks that make such a
    call.
    """
    found: Counter[str] = Counter()
    for path in [*ROOT.glob("shim/**/*.py"), *ROOT.glob("hook/**/*.py")]:
        text = path.read_text()
        if "faults.point" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                words = [ast.unparse(node.func), *map(ast.unparse, node.args)]
                if "faults.point" in words[:2]:
                    found[ast.literal_eval(words[words.index("faults.point") + 1])] += 1
    return found


def test_source_has_every_point_of_the_table_once_and_no_other() -> None:
    assert points_in_source() == Counter(dict.fromkeys(faults.POINTS, 1))


def test_an_unarmed_point_costs_nothing() -> None:
    count = 100_000
    best = min(timeit.repeat(lambda: faults.point("restore.ticket"), number=count, repeat=3))
    assert best / count * 1e9 < UNARMED_AT_MOST_NS


@pytest.mark.parametrize(
    ("fields", "number"),
    [({"action": "error"}, errno.EIO), ({"action": "enospc"}, errno.ENOSPC),
     ({"action": "error", "errno": "EACCES"}, errno.EACCES)],
)  # fmt: skip
def test_injected_error_is_an_oserror_that_names_its_point(
    fields: dict[str, str], number: int
) -> None:
    assert armed_with(point="store.synced", **fields) == []
    faults.point("store.renamed")
    with pytest.raises(OSError, match=r"fault point store\.synced") as raised:
        faults.point("store.synced")
    assert raised.value.errno == number


def test_count_and_container_select_the_pass_that_fails() -> None:
    assert armed_with(point="daemon.ticket", action="error", on=2, container="ab") == []
    faults.point("daemon.ticket", "abc")
    faults.point("daemon.ticket", "other")
    with pytest.raises(OSError, match=r"daemon\.ticket"):
        faults.point("daemon.ticket", "abd")
    faults.point("daemon.ticket", "abd")


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"point": "restore.nothing", "action": "kill"}, "no such point: restore.nothing"),
     ({"point": "restore.ticket", "action": "panic"}, "no such action: panic"),
     ({"point": "restore.ticket", "action": "error", "errno": "EFOO"}, "no such errno: EFOO"),
     ({"point": "restore.ticket", "action": "error", "errno": "errorcode"}, "no such errno"),
     ({"point": "restore.ticket", "action": "error", "on": "2"}, "`on` is no count: 2"),
     ({"action": "error"}, "'point'")],
)  # fmt: skip
def test_malformed_entry_is_reported_and_arms_nothing(fields: dict[str, str], why: str) -> None:
    (told,) = armed_with(**fields)
    assert why in told
    assert faults.armed() == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"faults": 1}', '{"faults": [1, null]}', "[" * 9]
)
def test_no_text_makes_arming_fail(text: str) -> None:
    assert faults.arm(text)
    assert faults.armed() == []


def test_fault_file_is_read_only_if_it_belongs_to_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    assert faults.arm_from_file(str(path)) == []
    path.write_text('{"faults": [{"point": "restore.ticket", "action": "error"}]}')
    path.chmod(0o644)
    (told,) = faults.arm_from_file(str(path))
    assert "not a file of root alone" in told
    (tmp_path / "link").symlink_to(path)
    path.chmod(0o600)
    (told,) = faults.arm_from_file(str(tmp_path / "link"))
    assert "cannot be opened" in told
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert faults.arm_from_file(str(tmp_path / "fifo"))
    assert faults.armed() == []
    assert faults.arm_from_file(str(path)) == []
    assert faults.armed() == ["fault point restore.ticket is armed: error"]


@pytest.mark.parametrize("action", ["kill", "hang"])
def test_kill_and_hang_end_only_by_a_signal(action: str) -> None:
    text = json.dumps({"faults": [{"point": "restore.ticket", "action": action}]})
    code = "import sys; from shim.contract import faults; faults.arm(sys.argv[1]);"
    code += "print(flush=True); faults.point('restore.ticket'); print('went on')"
    with subprocess.Popen(
        [sys.executable, "-c", code, text], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout
        process.stdout.readline()
        if action == "hang":
            time.sleep(0.2)
            assert process.poll() is None
            process.terminate()
        assert process.wait(10) == -(signal.SIGKILL if action == "kill" else signal.SIGTERM)
        assert process.stdout.read() == b""


def test_table_in_the_documentation_equals_the_table_in_code() -> None:
    rows = [
        line for line in (ROOT / "docs/faults.md").read_text().splitlines()
        if line.startswith("| `")
    ]  # fmt: skip
    wanted = {**faults.POINTS, **faults.ACTIONS}
    assert rows == [f"| `{name}` | {meaning} |" for name, meaning in wanted.items()]
