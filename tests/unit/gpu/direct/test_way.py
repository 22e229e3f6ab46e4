"""The way direct, end to end but for CRIU: the library, the carrier, the stand-in for libcuda."""

import os
import subprocess
import time

import pytest

from shim.contract.errors import GpuNotCheckpointed, GpuNotRestored
from shim.gpu.direct.session import (
    LibraryLost,
    LibraryRefused,
    NoLibrary,
    has_library,
    service_thread,
)
from tests.gpu.direct.program import Program
from tests.unit.gpuscene import BLOCK_MIB, BLOCKS, WITHIN_S, Scene, captured, emptied, right, soon


def test_a_busy_program_gives_its_memory_away_and_goes_on(scene: Scene) -> None:
    with scene.asked() as program:
        captured(scene, program)
        right(program)
        for path in scene.payload.iterdir():
            path.unlink()
        about = captured(scene, program)
        right(program)
        pieces = about["processes"][0]["pieces"]
        assert sum(octets for _, octets, _ in pieces) >= BLOCKS * BLOCK_MIB << 20
        saved = sum(path.stat().st_size for path in scene.payload.iterdir())
        assert saved == sum(octets for _, octets, _ in pieces)


def test_memory_is_loaded_from_the_files(scene: Scene) -> None:
    with scene.asked() as program, emptied(scene, program) as about:
        with scene.loading(about) as loading:
            loading.begin(soon())
            loading.give_back([program.pid], soon())
            loading.resume(soon())
            loading.end()
        right(program)
        assert scene.started[-1].poll() is not None


def test_truncated_payload_is_reported(scene: Scene) -> None:
    with scene.asked() as program, emptied(scene, program) as about:
        path = max(scene.payload.iterdir(), key=lambda each: each.stat().st_size)
        os.truncate(path, path.stat().st_size - 4096)
        with scene.loading(about) as loading:
            loading.begin(soon())
            with pytest.raises(GpuNotRestored, match="the payload ends at"):
                loading.give_back([program.pid], soon())
        os.kill(program.pid, 9)


def test_a_carrier_that_dies_before_it_has_the_memory_leaves_the_source_alone(scene: Scene) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        scene.started[-1].kill()
        with pytest.raises(GpuNotCheckpointed, match="the carrier"):
            evacuation.evacuate(soon())
        right(program)


def test_a_capture_that_is_given_up_leaves_the_source_alone(scene: Scene) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.give_back(soon())
        evacuation.resume(soon())
        evacuation.resume(soon())
        right(program)


def test_a_daemon_that_dies_with_the_memory_away_hurts_nobody(scene: Scene) -> None:
    """The carrier lives on without it, and gives the memory back."""
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        assert scene.on_device(program.pid) == 0
        evacuation._carrier._socket.close()  # type: ignore[attr-defined]
        right(program)
        scene.started[-1].wait(WITHIN_S)


def test_a_full_disk_costs_the_snapshot_and_not_the_source(scene: Scene) -> None:
    for number in range(16):
        (scene.payload / f"gpu0-{number:02d}.data").touch()  # what is there already cannot be made
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        evacuation.give_back(soon())
        evacuation.resume(soon())
        right(program)
        with pytest.raises(GpuNotCheckpointed, match="device memory was not saved"):
            evacuation.finish(soon())


def test_a_host_that_hangs_up_or_is_silent_opens_the_gate(scene: Scene) -> None:
    with scene.asked() as program, scene.door() as door:
        with door.call(program.pid, soon()) as session:
            session.close_gate(5.0, 20.0, soon())
            assert session.state(soon()).closed
        right(program)
        with door.call(program.pid, soon()) as session:
            session.close_gate(5.0, 0.3, soon())
            right(program)


def test_nothing_is_moved_while_the_gate_is_open(scene: Scene) -> None:
    with scene.asked() as program, scene.door() as door:
        with (
            door.call(program.pid, soon()) as session,
            pytest.raises(LibraryLost, match="gate is open"),
        ):
            session.drop(soon())
        right(program)


def test_a_call_that_does_not_return_keeps_the_gate_open(scene: Scene) -> None:
    """A thread inside of the driver is named, and the source goes on."""
    code = (
        "import ctypes, sys, threading, time\n"
        "lib = ctypes.CDLL('libcuda.so.1')\n"
        "context, at = ctypes.c_void_p(), ctypes.c_uint64()\n"
        "assert not lib.cuInit(0)\n"
        "assert not lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)\n"
        "assert not lib.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(16 << 20))\n"
        "lib.cuStandinBusy(600000)\n"
        "threading.Thread(target=lib.cuCtxSynchronize, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "open(sys.argv[1] + '/status', 'w').write('{\"answers\": 1}')\n"
        "while True: time.sleep(1)\n"
    )
    program = Program(["/usr/bin/python3", "-c", code, "STATUS"], str(scene.library))
    with program, scene.door() as door:
        program.ready(WITHIN_S)
        with door.call(program.pid, soon()) as session:
            with pytest.raises(LibraryRefused, match="cuCtxSynchronize has not returned"):
                session.close_gate(0.3, 20.0, soon())
            assert not session.state(soon()).closed
        os.kill(program.pid, 9)


def test_a_program_without_large_memory_has_no_thread_of_ours(scene: Scene) -> None:
    code = "import ctypes, time; ctypes.CDLL('libcuda.so.1').cuInit(0); time.sleep(60)"
    with Program(["/usr/bin/python3", "-c", code], str(scene.library)) as program:
        time.sleep(0.3)
        with pytest.raises(NoLibrary):
            service_thread(program.pid)
        assert not has_library(program.pid)
        os.kill(program.pid, 9)


SHARING = """
import ctypes, sys
class Handle(ctypes.Structure):
    _fields_ = [("octets", ctypes.c_char * 64)]
lib = ctypes.CDLL("libcuda.so.1")
context, at, handle = ctypes.c_void_p(), ctypes.c_uint64(), Handle()
size = ctypes.c_size_t(24 << 20)
assert not lib.cuInit(0)
assert not lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
here = ctypes.create_string_buffer(5)
if sys.argv[1] == "makes":
    assert not lib.cuMemAlloc_v2(ctypes.byref(at), size)
    assert not lib.cuMemcpyHtoD_v2(at, b"first", ctypes.c_size_t(5))
    assert not lib.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(at.value + 4096))
    print(bytes(handle).hex(), flush=True)
else:
    handle = Handle.from_buffer_copy(bytes.fromhex(sys.argv[2]))
    again = ctypes.c_uint64()
    assert not lib.cuIpcOpenMemHandle_v2(ctypes.byref(at), handle, 1)
    assert not lib.cuIpcOpenMemHandle_v2(ctypes.byref(again), handle, 1)
    assert at.value == again.value
    assert not lib.cuMemcpyDtoH_v2(here, at, ctypes.c_size_t(5))
    assert here.raw == b"first", here.raw
    assert not lib.cuMemcpyHtoD_v2(at, b"other", ctypes.c_size_t(5))
    print("opened", flush=True)
sys.stdin.readline()
if sys.argv[1] == "makes":
    assert not lib.cuMemcpyDtoH_v2(here, at, ctypes.c_size_t(5))
    print(here.raw.decode(), flush=True)
else:
    assert not lib.cuIpcCloseMemHandle(at)
    assert not lib.cuIpcCloseMemHandle(at)
    assert lib.cuIpcCloseMemHandle(at)
    print("closed", flush=True)
sys.stdin.readline()
"""


def test_processes_share_blocks_by_ipc_handles(scene: Scene) -> None:
    """CUDA's own handles cannot be made of them; and the host learns that something is open."""
    environment = {**scene.environment, "LD_PRELOAD": str(scene.library)}

    def start(*words: str) -> subprocess.Popen[str]:
        argv = ["/usr/bin/python3", "-c", SHARING, *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=environment)

    def next_line(program: subprocess.Popen[str], *, ask: bool = True) -> str:
        assert program.stdin
        assert program.stdout
        if ask:
            program.stdin.write("\n")
            program.stdin.flush()
        return program.stdout.readline().strip()

    with start("makes") as maker:
        handle = next_line(maker, ask=False)
        with start("opens", handle) as opener:
            assert next_line(opener, ask=False) == "opened"
            assert next_line(maker) == "other"
            with scene.door() as door:
                with door.call(opener.pid, soon()) as session:
                    assert {"open IPC handles", "imported handles"} <= set(session.hello.seen)
                with door.call(maker.pid, soon()) as session:
                    assert session.hello.seen == ["shared IPC handles"]
            assert next_line(opener) == "closed"
            with scene.door() as door, door.call(opener.pid, soon()) as session:
                assert session.hello.seen == []
            opener.communicate("\n")
        maker.communicate("\n")
    assert (opener.returncode, maker.returncode) == (0, 0)
