"""quickthaw-runc reads runc's command line, and hands on every line that it cannot read for
certain.
"""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.oci.call import parse

FRONT = Path(__file__).parents[3] / "shim/front/quickthaw-runc"
ROOT = ["--root", "/run/containerd/runc/k8s.io"]
LOG = ["--log", "/run/log.json", "--log-format", "json"]
CREATE = ["create", "--bundle", "/run/b", "--pid-file", "/run/b/init.pid", "abc"]


def test_create_call_of_containerd_is_parsed() -> None:
    call = parse([*ROOT, *LOG, "--systemd-cgroup", *CREATE])
    assert call is not None
    assert (call.command, call.container) == ("create", "abc")
    assert call.root_flags == ["--root=/run/containerd/runc/k8s.io", "--systemd-cgroup"]
    assert call.option("--bundle", "-b") == "/run/b"
    assert call.option("--pid-file") == "/run/b/init.pid"


def test_flags_may_have_their_value_behind_an_equals_sign() -> None:
    call = parse(["--root=/r", "create", "-b", "/b", "--no-pivot", "--preserve-fds=2", "abc"])
    assert call is not None
    assert call.root_flags == ["--root=/r"]
    assert call.options == {"-b": "/b", "--no-pivot": "", "--preserve-fds": "2"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--version"],
        ["state", "abc"],
        ["kill", "--all", "abc", "9"],
        ["--new-flag", *CREATE],
        ["create", "--new-flag", "value", "abc"],
        ["create", "--bundle", "/b"],
        ["start"],
        ["start", "abc", "def"],
    ],
)
def test_unknown_command_line_is_left_to_the_real_runtime(arguments: list[str]) -> None:
    assert parse(arguments) is None


@given(st.lists(st.text(max_size=12) | st.sampled_from(["create", "start", "--root", "-b"])))
def test_no_command_line_raises_an_error(arguments: list[str]) -> None:
    call = parse(arguments)
    assert call is None or call.container == arguments[-1]


@pytest.fixture
def through_front(tmp_path: Path) -> Path:
    """Returns the shell front with a real runtime that only shows its arguments."""
    shown = tmp_path / "runtime"
    shown.write_text(
        '#!/bin/sh\nfor a; do printf "%s\\0" "$a"; done >"$SHOWN.argv"\n'
        'cat /proc/$$/environ >"$SHOWN.env"\n'
        'ls -l /proc/$$/fd >"$SHOWN.fd"\nexit 42\n'
    )
    shown.chmod(0o755)
    (tmp_path / "etc").write_text(f"{shown}\n")
    front = tmp_path / "quickthaw-runc"
    text = FRONT.read_text().replace("/etc/quickthaw/runtime", str(tmp_path / "etc"))
    text = text.replace("/run/quickthaw/swapped", str(tmp_path))
    front.write_text(text)
    front.chmod(0o755)
    return front


@pytest.mark.parametrize(
    "arguments",
    [
        [*ROOT, *LOG, *CREATE],
        ["exec", "--process", "/tmp/with blank", "abc", "a  b", "", "*", "$HOME", "-x\n"],
        [],
    ],
)
def test_the_front_changes_nothing_of_a_call(through_front: Path, arguments: list[str]) -> None:
    shown = str(through_front.parent / "shown")
    environment = {"SHOWN": shown, "PATH": os.environ["PATH"], "A": "b c\n"}
    done = subprocess.run([through_front, *arguments], env=environment, check=False)
    assert done.returncode == 42, "the exit status is the real runtime's"
    argv = Path(f"{shown}.argv").read_bytes()
    assert argv == b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    found = dict(
        entry.split(b"=", 1) for entry in Path(f"{shown}.env").read_bytes().split(b"\0") if entry
    )
    assert found == {os.fsencode(k): os.fsencode(v) for k, v in environment.items()}


def test_the_front_passes_descriptors_on_and_leaks_none(through_front: Path) -> None:
    shown = str(through_front.parent / "shown")
    environment = {"SHOWN": shown, "PATH": os.environ["PATH"]}
    with open("/dev/zero", "rb") as kept:
        subprocess.run([through_front], env=environment, check=False, pass_fds=[kept.fileno()])
        fds = Path(f"{shown}.fd").read_text()
        assert f"{kept.fileno()} -> /dev/zero" in fds
    assert "quickthaw-runc" not in fds


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([*ROOT, *LOG, "start", "abc"], 0),
        ([*ROOT, *LOG, "delete", "abc"], 42),
        ([*ROOT, *LOG, "exec", "abc", "start"], 42),
        ([*ROOT, *LOG, "start", "other"], 42),
    ],
)
def test_a_swapped_container_is_started_already(
    through_front: Path, arguments: list[str], status: int
) -> None:
    (through_front.parent / "abc").touch()
    environment = {"SHOWN": str(through_front.parent / "shown"), "PATH": os.environ["PATH"]}
    done = subprocess.run([through_front, *arguments], env=environment, check=False)
    assert done.returncode == status
