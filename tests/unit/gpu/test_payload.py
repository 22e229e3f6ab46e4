"""A snapshot's facts about its GPUs, and their readers: parsers that raise nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract.paths import GPU_PAYLOAD
from shim.gpu import payload
from shim.gpu.payload import GpuPayload
from shim.gpu.support import Look, Process, findings

GPU = {"uuid": "GPU-00000000-0000-0000-0000-000000000001", "name": "NVIDIA H200", "memory_bytes": 1}
NCCL = {"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0"}
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


def test_payload_survives_writing_and_reading() -> None:
    made = GpuPayload(way="driver", processes=[1, 7], gpus=[{**GPU, "minor": 3}], about={"a": 1})
    found = payload.of({GPU_PAYLOAD: made.encode()})
    assert found is not None
    assert found.encode() == made.encode()
    assert found.gpus == [GPU]
    assert payload.of({}) is None


@given(st.text(max_size=30) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["way", "processes", "gpus", "about", "x"]), inner),
).map(json.dumps))  # fmt: skip
def test_no_text_makes_the_parser_raise_another_error(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        payload.of({GPU_PAYLOAD: text})


@given(st.text(max_size=60))
def test_only_uuids_are_uuids(text: str) -> None:
    try:
        octets = payload.octets(text)
    except ValueError:
        return
    assert len(bytes.fromhex(octets)) == 16


def looked(*processes: Process, **more: object) -> Look:
    fields: dict[str, object] = {"driver": "580.159.04", "gpus": [GPU], "processes": processes}
    return Look(**{**fields, **more})  # type: ignore[arg-type]


def process(pid: int = 1, **more: object) -> Process:
    fields: dict[str, object] = {"pid": pid, "gpus": {"GPU-0": 1 << 30}, "environment": {}}
    return Process(**{**fields, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("look", "codes"),
    [
        (looked(process()), []),
        (looked(gpus=None), ["gpu_unknown"]),
        (looked(driver="550.54.15"), ["gpu_driver"]),
        (looked(driver=""), ["gpu_driver"]),
        (looked(gpus=[{**GPU, "mig": True}]), ["gpu_mig"]),
        (looked(gpus=[{**GPU, "exclusive": True}]), ["gpu_exclusive"]),
        (looked(mps=["a daemon"]), ["gpu_mps"]),
        (looked(host_network=True), ["gpu_host_network"]),
        (looked(others=["process 3 has /dev/nvidiactl open"]), ["gpu_devices_open"]),
        (looked(process(gpus={"GPU-0": 1, "GPU-1": 1})), ["gpu_peers"]),
        (looked(process(gpus={"GPU-0": 1, "GPU-1": 1}, known=())), []),
        (looked(process(known=["managed memory"])), ["gpu_calls"]),
        (looked(process(1), process(2)), ["gpu_sharing"]),
        (looked(*(process(n, environment=NCCL) for n in (1, 2))), []),
        (looked(*(process(n, environment=SOCKETS) for n in (1, 2))), []),
        (looked(process(1, environment=NCCL), process(2)), ["gpu_sharing"]),
        (looked(*(process(n, environment={"NCCL_P2P_DISABLE": "1"}) for n in (1, 2))),
         ["gpu_sharing"]),
        (looked(*(process(n, known=()) for n in (1, 2))), []),
        (looked(process(), cgroup_room=1 << 30), ["gpu_host_memory"]),
        (looked(process(), host_room=1 << 20), ["gpu_host_memory"]),
        (looked(process(moved=1 << 29), cgroup_room=1 << 29), ["gpu_host_memory"]),
        (looked(process(moved=15 << 26), cgroup_room=1 << 29), []),
        (looked(process(moved=1 << 40), cgroup_room=1 << 27, host_room=1 << 27), []),
        (looked(process(moved=15 << 26, address_room=1 << 28)), []),
        (looked(process(), cgroup_room=2 << 30, host_room=2 << 30), []),
        (looked(process(address_room=1 << 20)), ["gpu_address_space"]),
    ],
)  # fmt: skip
def test_each_row_refuses_alone(look: Look, codes: list[str]) -> None:
    refused = [row for row in findings(look) if not row["fits"]]
    assert [row["code"] for row in refused] == codes
    assert all(row["why"] and row["do"] for row in refused)
