"""The parts of the way direct: the messages, the layout of the payload, the library's file."""

import array
import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.gpu.direct import mover, talk, wire
from shim.gpu.direct.device import AccessDesc, Location, Properties
from tests.gpu.direct import preload

GRAIN = 2 << 20
CUDA = Path("/usr/local/cuda/include/cuda.h")


@given(st.lists(st.integers(1, 1200), max_size=40), st.integers(1, 16))
def test_every_octet_of_every_piece_is_in_exactly_one_chunk(grains: list[int], files: int) -> None:
    sizes = [grain * GRAIN for grain in grains]
    chunks = mover.layout(sizes, files)
    assert len({(chunk.file, chunk.number) for chunk in chunks}) == len(chunks)
    assert all(chunk.octets == mover.CHUNK_BYTES for chunk in chunks[:-1])
    ends = [0] * len(sizes)
    for chunk in chunks:
        for part in chunk.parts:
            assert part.at == ends[part.piece]
            ends[part.piece] += part.octets
    assert ends == sizes
    for file in range(files):  # each file is without holes
        numbers = [chunk.number for chunk in chunks if chunk.file == file]
        assert numbers == list(range(len(numbers)))


@given(st.binary(max_size=4200), st.integers(0, 5))
def test_bytes_from_a_container_are_a_message_or_malformed(data: bytes, count: int) -> None:
    """Descriptors that come with nonsense are closed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        before = len(os.listdir("/proc/self/fd"))
        fds = array.array("i", [its.fileno()] * count)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else []
        its.sendmsg([data], rights)
        with contextlib.suppress(wire.Malformed, EOFError):
            message = wire.receive(ours)
            try:
                message.words()
                for piece in wire.lent(message):
                    os.close(piece.fd)
            finally:
                message.close()
            wire.Hello(message.body)
        assert len(os.listdir("/proc/self/fd")) == before


@given(
    kind=st.integers(1, 16), count=st.integers(0, 2**32 - 1), value=st.integers(0, 2**32 - 1),
    body=st.binary(max_size=4000),
)  # fmt: skip
def test_a_message_arrives_as_it_was_sent(kind: int, count: int, value: int, body: bytes) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        wire.send(its, kind, count=count, value=value, body=body)
        got = wire.receive(ours)
    assert (got.kind, got.count, got.value, got.body) == (kind, count, value, body)


def test_more_descriptors_than_agreed_are_refused_and_closed() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        before = len(os.listdir("/proc/self/fd"))
        rights = array.array("i", [its.fileno()] * (wire.BATCH + 1))
        its.sendmsg([bytes(16)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with pytest.raises(wire.Malformed):
            wire.receive(ours)
        assert len(os.listdir("/proc/self/fd")) == before


@given(st.binary(max_size=300))
def test_words_of_a_container_obey_no_terminal(text: bytes) -> None:
    assert wire.printable(text).isprintable()


def test_chunk_with_changed_content_is_reported() -> None:
    check = mover.compared([["0" * 64], None])
    check(1, 0, memoryview(b"x"))
    with pytest.raises(ValueError, match="file 0, chunk 0"):
        check(0, 0, memoryview(b"x"))


def test_the_library_loads_with_a_c_library_of_2018() -> None:
    """It needs nothing but libc, and of that no version after 2.28."""
    path = str(preload.shipped())
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", preload.run(["readelf", "-d", path]))
    assert needed == ["libc.so.6"]
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", preload.run(["objdump", "-T", path]))
    assert max((int(a), int(b)) for a, b in versions) <= (2, 28)


def test_programs_without_cuda_do_not_notice_the_library() -> None:
    environment = {**os.environ, "LD_PRELOAD": str(preload.shipped())}
    code = (
        "import ctypes, threading\n"
        "here = ctypes.CDLL(None)\n"
        "assert here.getpid() > 0\n"
        "try: here.cuInit\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('a driver that is not there')\n"
        "print(threading.active_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    argv = ["bash", "-c", "ls / | head -n 1 | cat"]
    with_it = subprocess.run(argv, env=environment, capture_output=True, check=True)
    assert (with_it.stdout, with_it.stderr) == (
        subprocess.run(argv, capture_output=True, check=True).stdout, b"",
    )  # fmt: skip


OURS = {
    "LOCATION_DEVICE": "CU_MEM_LOCATION_TYPE_DEVICE",
    "TYPE_PINNED": "CU_MEM_ALLOCATION_TYPE_PINNED",
    "HANDLE_POSIX_FD": "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR",
    "ACCESS_READWRITE": "CU_MEM_ACCESS_FLAGS_PROT_READWRITE",
    "ATTRIBUTE_RDMA_VMM": "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED",
    "ATTRIBUTE_VMM": "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "ATTRIBUTE_POSIX_FD": "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
    "POINTER_CONTEXT": "CU_POINTER_ATTRIBUTE_CONTEXT",
    "POINTER_LEGACY_IPC": "CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE",
    "POINTER_RANGE_START": "CU_POINTER_ATTRIBUTE_RANGE_START_ADDR",
    "POINTER_RANGE_SIZE": "CU_POINTER_ATTRIBUTE_RANGE_SIZE",
    "CUDA_ERROR_MAP_FAILED": "CUDA_ERROR_MAP_FAILED",
    "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD": "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
    "sizeof(struct properties)": "sizeof(CUmemAllocationProp)",
    "offsetof(struct properties, usage)": "offsetof(CUmemAllocationProp, allocFlags.usage)",
    "offsetof(struct properties, at)": "offsetof(CUmemAllocationProp, location)",
    "sizeof(struct access)": "sizeof(CUmemAccessDesc)",
    "offsetof(struct access, flags)": "offsetof(CUmemAccessDesc, flags)",
    "sizeof(struct ipc_handle)": "sizeof(CUipcMemHandle)",
    "sizeof(CUhandle)": "sizeof(CUmemGenericAllocationHandle)",
}  # fmt: skip


def values(at: Path, include: str, words: list[str]) -> str:
    """Returns the values of C expressions, with a header."""
    lines = [f'  printf("%ld\\n", (long)({word}));' for word in words]
    source = at / "values.c"
    head = ["#include <stddef.h>", "#include <stdio.h>", f'#include "{include}"']
    source.write_text("\n".join([*head, "int main(void) {", *lines, "  return 0;", "}", ""]))
    preload.run(["gcc", "-std=gnu11", f"-I{CUDA.parent}", "-o", str(at / "values"), str(source)])
    return preload.run([str(at / "values")])


@pytest.mark.skipif(not CUDA.exists(), reason="no cuda.h")
def test_structures_and_numbers_are_those_of_cuda_h(tmp_path: Path) -> None:
    ours = values(tmp_path, str(preload.SOURCE / "preload" / "abi.h"), list(OURS))
    assert ours == values(tmp_path, str(CUDA), list(OURS.values()))


@pytest.mark.skipif(not CUDA.exists(), reason="no cuda.h")
def test_the_hosts_structures_are_those_of_cuda_h(tmp_path: Path) -> None:
    sizes = values(tmp_path, str(CUDA), [f"sizeof({name})" for name in
                   ("CUmemLocation", "CUmemAccessDesc", "CUmemAllocationProp")])  # fmt: skip
    assert [int(size) for size in sizes.split()] == [
        ctypes.sizeof(structure) for structure in (Location, AccessDesc, Properties)
    ]


@pytest.mark.skipif(not CUDA.exists(), reason="no cuda.h")
def test_the_list_of_functions_is_that_of_cuda_h() -> None:
    made = preload.run([sys.executable, str(preload.SOURCE / "functions.py"), str(CUDA)])
    assert made == (preload.SOURCE / "preload" / "functions.h").read_text()


def test_objects_of_any_size_arrive() -> None:
    """The digests of 30 GiB, in chunks of 4 MiB, are more than a socket takes."""
    digests = {f"gpu0-{file:02d}.data": ["ab" * 32] * 480 for file in range(16)}
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        for sent in ({}, {"do": "load", "digests": digests}, {"do": "open"}):
            talk.send(ours, sent)
        assert talk.receive(its) == {}
        assert talk.receive(its) == {"do": "load", "digests": digests}
        assert talk.receive(its) == {"do": "open"}
        ours.close()
        assert talk.receive(its) is None
