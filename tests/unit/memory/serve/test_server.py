"""Requirements on the parts of a page server: CRIU's messages, layout, payload, guard."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import signal
import socket
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract.paths import MEMORY_LAYOUT
from shim.contract.ticket import Ticket
from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel import process, procfs
from shim.memory import layout
from shim.memory.serve import workingset
from shim.memory.serve.guard import Guard
from shim.memory.serve.lazysocket import LazySocket, NotCriu
from shim.memory.serve.payload import Damaged, Payload

FINISHED = struct.pack("<i", 0x52535446)
PAGE = mmap.PAGESIZE


# CRIU's messages


def send(socket_: socket.socket, pids: list[int], fd: int) -> None:
    for pid in pids:
        socket_.send(struct.pack("<i", pid))
        if pid > 0:
            socket.send_fds(socket_, [b"\0"], [fd])
    socket_.send(FINISHED)


@given(st.lists(st.integers(-(2**31), 2**31 - 1).filter(lambda n: n not in (0, 0x52535446))))
def test_each_process_comes_with_its_descriptor_and_zombies_with_none(pids: list[int]) -> None:
    ours, its = socket.socketpair()
    with ours, its, open(os.devnull) as null:
        criu = LazySocket(its)
        received = []
        for pid in pids[:100]:
            send(ours, [pid], null.fileno())
            received += list(criu.received())
        for _, fd in received:
            assert os.fstat(fd).st_rdev == os.fstat(null.fileno()).st_rdev
            os.close(fd)
        assert [pid for pid, _ in received] == [pid for pid in pids[:100] if pid > 0]


def test_message_in_pieces_without_its_descriptor_is_refused() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        criu = LazySocket(its)
        ours.send(struct.pack("<i", 7))
        assert list(criu.received()) == []
        ours.send(b"\0")  # a byte without a descriptor
        with pytest.raises(NotCriu, match="process 7 came with 0 descriptors"):
            list(criu.received())


@pytest.mark.parametrize("sent", [b"", b"\x01\x00", struct.pack("<i", 7)])
def test_criu_that_ends_inside_a_message_has_ended_and_made_no_error(sent: bytes) -> None:
    """CRIU kills its processes after an error of its own, between any two bytes."""
    ours, its = socket.socketpair()
    with its:
        criu = LazySocket(its)
        ours.send(sent)
        assert list(criu.received()) == []
        ours.close()
        assert list(criu.received()) == []
        assert criu.closed
        assert not criu.finished


def test_criu_that_leaves_bytes_unread_has_ended() -> None:
    ours, its = socket.socketpair()
    with its:
        criu = LazySocket(its)
        its.send(b"nobody reads this")
        ours.close()  # ECONNRESET
        assert list(criu.received()) == []
        assert criu.closed


@given(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=4), st.data())
def test_however_criu_ends_only_complete_processes_are_received(
    pids: list[int], data: st.DataObject
) -> None:
    """CRIU's messages are cut anywhere; the descriptor comes with its byte."""
    cut = data.draw(st.integers(0, 5 * len(pids)))
    ours, its = socket.socketpair()
    with its, open(os.devnull) as null:
        criu = LazySocket(its)
        for number, pid in enumerate(pids):
            ours.send(struct.pack("<i", pid)[: max(0, cut - 5 * number)])
            if cut > 5 * number + 4:
                socket.send_fds(ours, [b"\0"], [null.fileno()])
        ours.close()
        received = list(criu.received())
        for _, fd in received:
            os.close(fd)
        assert [pid for pid, _ in received] == pids[: cut // 5]
        assert criu.closed
        assert not criu.finished


# The layout


pages = st.integers(0, 1000)
extents = st.lists(st.tuples(pages, st.integers(1, 50)), max_size=20).map(
    lambda gaps: [
        (start * PAGE, (start + size) * PAGE, size * PAGE) for start, size in _placed(gaps)
    ]
)


def _placed(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, at = [], 0
    for gap, size in gaps:
        found.append((at + gap, size))
        at += gap + size
    return found


@given(extents)
def test_ranges_survive_writing_and_reading(written: list[tuple[int, int, int]]) -> None:
    assert layout.decode_ranges(layout.encode_ranges(written)) == written


@given(extents, st.data())
def test_changed_ranges_are_refused_or_in_order(
    written: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    raw = bytearray(layout.encode_ranges(written))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = layout.decode_ranges(bytes(raw))
    except layout.BadLayout:
        return
    behind = 0
    for start, end, offset in found:
        assert behind <= start < end, "what is read is in order, whatever was written"
        assert not (start | end | offset) % PAGE
        behind = end


def test_error_names_the_fault_of_a_layout() -> None:
    space = {
        "pid": 1, "data": "space-1.data", "ranges": "space-1.ranges", "areas": [[0, 8192]],
        "huge": [],
    }  # fmt: skip
    files = {
        MEMORY_LAYOUT: layout.encode([space], []),
        "space-1.ranges": layout.encode_ranges([(0, 8192, 0)]),
    }
    (found,) = layout.decode(files, {"space-1.data": 8192}).spaces
    assert (found.pid, found.extents, found.areas) == (1, [(0, 8192, 0)], [(0, 8192)])
    with pytest.raises(layout.BadLayout, match="too short for its ranges"):
        layout.decode(files, {"space-1.data": 4096})
    with pytest.raises(layout.BadLayout, match="incomplete"):
        layout.decode(files, {})
    with pytest.raises(layout.BadLayout, match="no schema"):
        layout.decode({MEMORY_LAYOUT: b'{"schema": 9}'}, {})


# The payload


@pytest.fixture
def content(tmp_path: Path) -> tuple[Path, list[str]]:
    raw = b"".join(bytes([number]) * CHUNK_BYTES for number in range(5)) + b"rest" * 1024
    path = tmp_path / "space-1.data"
    path.write_bytes(raw)
    digests = [
        hashlib.sha256(raw[at : at + CHUNK_BYTES]).hexdigest()
        for at in range(0, len(raw), CHUNK_BYTES)
    ]
    return path, digests


def read(payload: Payload, offset: int, size: int) -> bytes:
    with payload.at(offset, size) as (address, there):
        import ctypes

        return ctypes.string_at(address, there)


@pytest.mark.parametrize("is_vouched_for", [True, False])
def test_content_equals_the_file(content: tuple[Path, list[str]], is_vouched_for: bool) -> None:
    path, digests = content
    with path.open("rb") as file:
        payload = Payload(
            path.name, file.fileno(), path.stat().st_size, None if is_vouched_for else digests
        )
        assert read(payload, CHUNK_BYTES, 3) == b"\x01\x01\x01"
        for number in (0, 4, 2, 3, 1, 0):
            assert read(payload, number * CHUNK_BYTES + PAGE, PAGE) == bytes([number]) * PAGE
        assert read(payload, 5 * CHUNK_BYTES, 4096) == b"rest" * 1024
        assert payload.is_checked


def test_changed_content_is_not_given_out(content: tuple[Path, list[str]]) -> None:
    path, digests = content
    with path.open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 17)
        file.write(b"x")
        file.flush()
        payload = Payload(path.name, file.fileno(), path.stat().st_size, digests)
        assert read(payload, 0, 2) == b"\0\0"
        with pytest.raises(Damaged, match="chunk 2: expected SHA-256"):
            read(payload, 2 * CHUNK_BYTES, PAGE)
        with pytest.raises(Damaged, match="chunk 2"):
            payload.check_rest()
        assert not payload.is_checked


def test_shortened_file_is_damaged(content: tuple[Path, list[str]]) -> None:
    path, digests = content
    size = path.stat().st_size
    os.truncate(path, CHUNK_BYTES)
    with path.open("rb") as file:
        payload = Payload(path.name, file.fileno(), size, digests)
        with pytest.raises(Damaged, match="ends at"):
            read(payload, CHUNK_BYTES, PAGE)


# The working set


def test_working_set_is_known_at_the_next_restore(tmp_path: Path) -> None:
    recorder = workingset.Recorder()
    for address in (0x20000, 0x20001, 0x10000):
        recorder.asked(1, address)
    windows = recorder.after([(1, 0x10000), (2, 0)])
    assert windows == [(1, 0x10000), (2, 0), (1, 0x20000)]
    workingset.write("a" * 64, windows, str(tmp_path))
    assert workingset.read("a" * 64, str(tmp_path)) == windows
    assert [path.name for path in tmp_path.iterdir()] == [f"{'a' * 64}.json"]


def test_nearly_adjacent_faults_become_a_single_range() -> None:
    windows = [(1, 0x30000), (1, 0x10000), (2, 0x40000), (1, 0x0), (1, 0x60000), (1, 0x400000)]
    assert workingset.ranges(windows) == [
        (1, 0x0, 0x40000), (1, 0x60000, 0x70000), (1, 0x400000, 0x410000), (2, 0x40000, 0x50000),
    ]  # fmt: skip
    assert workingset.ranges([]) == []


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(0, 40)), max_size=60, unique=True))
def test_every_fault_is_in_a_range_of_bounded_size(
    places: list[tuple[int, int]],
) -> None:
    windows = [(pid, place * 0x10000) for pid, place in places]
    found = workingset.ranges(windows)
    for pid, start in windows:
        assert [pid for each, begin, end in found if each == pid and begin <= start < end] == [pid]
    assert all(end - start <= 1 << 20 for _, start, end in found)


def test_early_faults_come_before_much_later_faults() -> None:
    windows = [(1, number * 0x10000) for number in range(5000, 0, -1)]
    found = workingset.ranges(windows)
    assert found[0][1] == 3977 * 0x10000, "the lowest address of the first 64 MiB"
    assert found[-1][1] < 0x10000 * 905


@given(st.binary(max_size=60))
def test_malformed_working_set_counts_as_empty(raw: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, f"{'a' * 64}.json").write_bytes(raw)
        assert workingset.read("a" * 64, directory) == []


# The guard


def ticket() -> Ticket:
    return Ticket(
        container="f" * 64, snapshot="a" * 64, fallback="cold", deadline_s=100.0,
        pod_namespace="n", pod_name="p", pod_uid="u", container_name="s", resume="", turns=2,
        others=0,
        turn_wait_s=1.0,
        turn_hold_s=60.0, gpu_pairs=[],
    )  # fmt: skip


def guard_of(found: Guard) -> int:
    return found._pid


def held_by(pid: int) -> set[str]:
    """Returns a running process's open files. Leaves out files that it closes meanwhile."""
    found = set()
    for fd in procfs.descriptors(pid):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def test_ended_guard_is_noticed_and_replaced() -> None:
    guard = Guard(ticket(), mmap.mmap(-1, PAGE))
    first = guard_of(guard)
    with contextlib.ExitStack() as stack:
        stack.callback(guard.dismiss)  # a guard left alone kills a server that stands still
        null = stack.enter_context(open(os.devnull))
        guard.keep(null.fileno())
        os.kill(first, signal.SIGKILL)
        assert process.ends(first, time.monotonic() + 5)
        guard.renew()
        second = guard_of(guard)
        assert second != first
        assert os.devnull in held_by(second), "the new one has what the old one had"
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_stopped_guard_does_not_delay_the_server() -> None:
    guard = Guard(ticket(), mmap.mmap(-1, PAGE))
    pid = guard_of(guard)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    guard.dismiss()
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
