"""The code that a pod waits for imports almost nothing, and reports everything that it must."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import errors, journal, outcome, ticket
from shim.criu import options
from shim.criu.fixedwidth import address_words, encode_word
from shim.kernel import alarm, process
from shim.network import readdress
from shim.restore import sequence

ROOT = Path(__file__).parents[3]
HEAVY = {"asyncio", "google", "grpc", "logging", "pyroute2", "subprocess", "pathlib", "typing",
         "dataclasses", "argparse", "rich", "prometheus_client"}  # fmt: skip
LEAN = [
    "shim.front.main",
    "shim.restore.sequence",
    "shim.restore.forget",
    "hook.__main__",
    "hook.prestart",
    "hook.poststop",
    "shim.workload.probe",
    "shim.integrity.check",
]
SNAPSHOT = "5" * 64


@pytest.mark.parametrize("module", LEAN)
def test_swap_path_stays_lean(module: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-ISE", "-c", code], text=True).split()
    assert HEAVY.isdisjoint(loaded), "every one of these is paid by the pod that waits"


BEFORE_THE_RUNTIME = ["shim.front.main", "shim.restore.guard", "shim.restore.sequence"]
BESIDE_IT = ["shim.contract.manifest", "shim.gate.decide", "shim.gate.request", "shim.restore.oom",
             "shim.integrity.check", "shim.shm.fill", "shim.network.readdress",
             "shim.restore.memory", "shim.restore.resume"]  # fmt: skip


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (BEFORE_THE_RUNTIME, {"json", "re", "shutil", "hashlib", "socket", "shim.gate.checks"}),
        (BEFORE_THE_RUNTIME + BESIDE_IT, {"json", "re", "shutil", "hashlib", "shim.gate.key"}),
    ],
)
def test_modules_that_take_milliseconds_are_not_imported(
    modules: list[str], without: set[str]
) -> None:
    imports = "; ".join(f"import {module}" for module in modules)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {imports}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-ISE", "-c", code], text=True).split()
    assert without.isdisjoint(loaded)


def a_ticket(**changes: object) -> ticket.Ticket:
    fields: dict[str, object] = {
        "container": "abc", "snapshot": SNAPSHOT, "fallback": "cold", "deadline_s": 100.0,
        "turns": 4, "turn_wait_s": 10.0, "turn_hold_s": 60.0,
        "pod_namespace": "default", "pod_name": "pod", "pod_uid": "uid", "container_name": "main",
        "resume": "", "gpu_pairs": [], "others": 0,
    }  # fmt: skip
    return ticket.Ticket(**fields | changes)


def test_ticket_survives_writing_and_belongs_to_root_alone(tmp_path: Path) -> None:
    ticket.write(a_ticket(), str(tmp_path))
    path = tmp_path / "abc.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ticket.read("abc", str(tmp_path)).encode() == a_ticket().encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["abc.json"]


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o602])
def test_a_ticket_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    ticket.write(a_ticket(), str(tmp_path))
    (tmp_path / "abc.json").chmod(mode)
    with pytest.raises(errors.TicketUnreadable, match="not a file of root alone"):
        ticket.read("abc", str(tmp_path))


def test_a_planted_link_is_no_ticket(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(a_ticket().encode())
    (tmp_path / "abc.json").symlink_to("elsewhere")
    with pytest.raises(errors.TicketUnreadable):
        ticket.read("abc", str(tmp_path))


def test_a_ticket_of_another_container_is_refused(tmp_path: Path) -> None:
    ticket.write(a_ticket(container="other"), str(tmp_path))
    (tmp_path / "other.json").rename(tmp_path / "abc.json")
    with pytest.raises(errors.TicketUnreadable, match="it is for other"):
        ticket.read("abc", str(tmp_path))


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.sampled_from([*a_ticket().__slots__, "schema", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_bytes_make_the_ticket_parser_raise_another_error(data: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        ticket.decode(data)


def test_an_outcome_is_taken_once(tmp_path: Path) -> None:
    outcome.write("abc", {"result": outcome.COLD}, str(tmp_path))
    assert outcome.take("abc", str(tmp_path)) == {"schema": 1, "result": "cold"}
    assert outcome.take("abc", str(tmp_path)) is None


def test_journal_is_read_backwards_and_a_torn_line_is_ignored(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal.note(path, journal.ROOTFS, {"a": 1})
    journal.note(path, journal.SHM, ["b"])
    with open(path, "a") as file:
        file.write('["address", "10.')
    assert list(journal.changes(path)) == [("shm", ["b"]), ("rootfs", {"a": 1})]
    assert list(journal.changes(str(tmp_path / "none"))) == []


def test_a_swap_under_way_is_seen_by_others(tmp_path: Path) -> None:
    with journal.lock(str(tmp_path)):
        assert journal.is_locked(str(tmp_path))
    assert not journal.is_locked(str(tmp_path))
    assert not journal.is_locked(str(tmp_path / "none"))


def test_every_error_has_an_effect_and_a_code_of_its_own() -> None:
    def below(cls: type[errors.QuickthawError]) -> list[type[errors.QuickthawError]]:
        return [cls, *(found for sub in cls.__subclasses__() for found in below(sub))]

    found = [cls for cls in below(errors.QuickthawError) if cls.__module__ == errors.__name__]
    codes = [cls.exit_code for cls in found]
    assert len(set(codes)) == len(codes)
    message = str(errors.CriuRestoreFailed("what", container="abc", why="why", do="Do."))
    assert message == "what [abc]: why; the container starts cold. Do."


def test_late_program_is_killed_with_its_children() -> None:
    began = time.monotonic()
    with pytest.raises(process.TooLate):
        process.run(["sh", "-c", "sleep 1000 & sleep 1000"], until=began + 0.2, quiet=True)
    assert time.monotonic() - began < 5
    assert process.run(["sh", "-c", "exit 7"], until=time.monotonic() + 10) == 7
    assert process.run(["sh", "-c", "kill -9 $$"], until=time.monotonic() + 10) == 128 + 9


def test_preparation_runs_in_the_child(tmp_path: Path) -> None:
    here, there = os.getcwd(), str(tmp_path)
    argv = ["sh", "-c", f"test $(pwd -P) = {tmp_path.resolve()}"]
    first = lambda: os.chdir(there)  # noqa: E731
    assert process.run(argv, until=time.monotonic() + 10, first=first) == 0
    assert os.getcwd() == here
    with pytest.raises(NotADirectoryError):
        process.run(argv, until=time.monotonic() + 10, first=lambda: os.chdir("/dev/null"))


def test_addresses_are_replaced_by_addresses_of_the_same_family() -> None:
    assert readdress.replacements(["10.0.0.1", "fd00::1"], ["10.0.0.2", "10.0.0.3"]) == {
        "10.0.0.1": "10.0.0.2"
    }
    assert address_words("1.2.3.4") == [0x04030201]


def test_addresses_are_overwritten_in_place() -> None:
    old = encode_word(address_words("10.0.0.1")[0])
    new = encode_word(address_words("10.0.0.2")[0])
    patched = readdress.readdressed(
        b"head" + old + b"tail", [("10.0.0.1", [4])], {"10.0.0.1": "10.0.0.2"}
    )
    assert patched == b"head" + new + b"tail"


def test_uts_image_gets_the_new_host_name() -> None:
    def image(entry: bytes) -> bytes:
        return b"01234567" + len(entry).to_bytes(4, "little") + entry

    changed = readdress.renamed(image(b"\x0a\x03old\x12\x06(none)"), "longer")
    assert changed == image(b"\x0a\x06longer\x12\x06(none)")
    with pytest.raises(ValueError, match="no host name"):
        readdress.renamed(image(b"\x12\x06(none)"), "any")
    with pytest.raises(ValueError, match="no host name"):
        readdress.renamed(image(b"\x0a\x03old"), "x" * 65)


def test_a_view_links_big_images_relatively(tmp_path: Path) -> None:
    own = tmp_path / "store" / "criu"
    own.mkdir(parents=True)
    (own / "pages-1.img").write_bytes(b"pages")
    (own / "files.img").write_bytes(b"captured")
    view = str(tmp_path / "view")
    readdress.view_of(str(own), view, ["pages-1.img"], {"files.img": b"patched"})
    assert Path(view, "files.img").read_bytes() == b"patched"
    assert os.readlink(f"{view}/pages-1.img") == "../store/criu/pages-1.img"
    assert Path(view, "pages-1.img").read_bytes() == b"pages"
    assert (own / "files.img").read_bytes() == b"captured", "the snapshot stays"


def test_alarm_ends_only_code_that_hangs() -> None:
    began = time.monotonic()
    with pytest.raises(alarm.TooLate), alarm.raising(began + 0.1):
        time.sleep(60)
    with alarm.raising(time.monotonic() + 60):
        pass
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_alarm_during_a_program_kills_the_program() -> None:
    until = time.monotonic() + 30
    with pytest.raises(alarm.TooLate), alarm.raising(time.monotonic() + 0.2):
        process.run(["sh", "-c", "sleep 1000 & exec sleep 1000"], until=until, quiet=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    blocked = "import signal; exit(bool(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    assert process.run([sys.executable, "-c", blocked], until=until) == 0


def test_late_swap_leaves_no_mark_on_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mark `start` would take the container for restored, and it would never run."""
    monkeypatch.setattr(sequence, "SWAPPED", str(tmp_path))
    monkeypatch.setattr(options, "write", lambda _: None)
    swap = object.__new__(sequence.Swap)
    swap.ticket, swap.work, swap.private = a_ticket(), str(tmp_path / "work"), str(tmp_path)

    def rings(path: str, mode: str) -> None:
        Path(path).open(mode).close()
        assert (tmp_path / "abc").exists()
        raise alarm.TooLate

    monkeypatch.setattr(sequence, "open", rings, raising=False)
    with pytest.raises(alarm.TooLate), ExitStack() as undo, ExitStack() as held:
        swap._start_runtime(undo, held)
    assert not (tmp_path / "abc").exists()


def test_alarm_that_is_held_rings_later() -> None:
    reached = []

    def hold() -> None:
        with alarm.held():
            time.sleep(0.2)
            reached.append("the end of the hold")
        reached.append("more")

    with pytest.raises(alarm.TooLate), alarm.raising(time.monotonic() + 0.05):
        hold()
    assert reached == ["the end of the hold"]


def guarded(tmp_path: Path, ends: str) -> dict[str, object] | None:
    """Runs a guarded process that `ends`; returns the outcome that the guard wrote, if it did."""
    code = (
        "import sys, time, os\n"
        "from shim.contract import ticket, outcome\n"
        "from shim.restore import guard\n"
        f"guard.outcome.write.__defaults__ = ({str(tmp_path)!r},)\n"
        "from shim.restore import forget\n"
        "forget.forget = lambda container: None\n"
        "t = ticket.decode(sys.argv[1])\n"
        f"with guard.watching(t, ['true'], time.monotonic() + 0.5): {ends}\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, a_ticket().encode().decode()], cwd=ROOT, check=False
    )
    deadline = time.monotonic() + (5 if ended.returncode else 0.2)
    while time.monotonic() < deadline and not (tmp_path / "abc.json").exists():
        time.sleep(0.01)
    return outcome.take("abc", str(tmp_path))


@pytest.mark.parametrize(
    ("ends", "why"),
    [("os.kill(os.getpid(), 9)", "was killed"), ("time.sleep(60)", "hung, and was killed")],
)
def test_guard_ends_a_killed_or_stopped_swap(tmp_path: Path, ends: str, why: str) -> None:
    found = guarded(tmp_path, ends)
    assert found
    assert (found["result"], found["error_class"]) == (outcome.KILLED, "SwapKilled")
    assert why in str(found["error"])


@pytest.mark.parametrize("ends", ["pass", "raise SystemExit(0)"])
def test_guard_leaves_a_finished_swap_alone(tmp_path: Path, ends: str) -> None:
    assert guarded(tmp_path, ends) is None
