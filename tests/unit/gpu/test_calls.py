"""The structures of the checkpoint API are those of cuda-bindings, field by field."""

import ctypes

import pytest
from cuda.bindings import driver

from shim.gpu import calls, helper

OLD, NEW = b"0123456789abcdef", b"fedcba9876543210"


def uuid(octets: bytes) -> driver.CUuuid:
    made = driver.CUuuid()
    ctypes.memmove(made.getPtr(), octets, len(octets))
    return made


def test_arguments_of_a_lock() -> None:
    theirs = driver.CUcheckpointLockArgs()
    theirs.timeoutMs = 0x12345678
    assert calls.LockArgs.from_address(theirs.getPtr()).timeoutMs == 0x12345678


def test_pairs_of_gpus_and_the_arguments_of_a_restore() -> None:
    pair = driver.CUcheckpointGpuPair()
    pair.oldUuid, pair.newUuid = uuid(OLD), uuid(NEW)
    theirs = driver.CUcheckpointRestoreArgs()
    theirs.gpuPairs, theirs.gpuPairsCount = [pair, pair], 2
    ours = calls.RestoreArgs.from_address(theirs.getPtr())
    assert ours.gpuPairsCount == 2
    assert [(bytes(each.oldUuid), bytes(each.newUuid)) for each in ours.gpuPairs[:2]] == [
        (OLD, NEW), (OLD, NEW),
    ]  # fmt: skip
    assert ctypes.sizeof(calls.GpuPair) == 32


@pytest.mark.parametrize("name", ["LockArgs", "CheckpointArgs", "RestoreArgs", "UnlockArgs"])
def test_all_arguments_have_the_size_of_a_cache_line(name: str) -> None:
    assert ctypes.sizeof(getattr(calls, name)) == 64


def test_states_and_codes_have_the_drivers_numbers() -> None:
    for number, state in enumerate(calls.STATES):
        assert driver.CUprocessState[f"CU_PROCESS_STATE_{state.upper()}"].value == number
    for ours, theirs in (
        (helper.NOT_INITIALIZED, "NOT_INITIALIZED"), (helper.ILLEGAL_STATE, "ILLEGAL_STATE"),
        (helper.NOT_READY, "NOT_READY"),
    ):  # fmt: skip
        assert driver.CUresult[f"CUDA_ERROR_{theirs}"].value == ours
