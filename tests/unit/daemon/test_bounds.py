"""Nothing that a pod's author can make long makes the daemon slow, large or talkative."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

import pytest

from shim.contract.errors import BadAnnotation
from shim.daemon.oneline import OneLine
from shim.daemon.watch import SLOW_S, SlowSteps, memory, watched
from shim.gate.decide import Refused
from shim.gate.facts import compact
from shim.gate.key import PodValues, workload_facts
from shim.gate.refusal import Finding
from shim.node import tool
from shim.oci.spec import Spec
from shim.workload.annotations import parse, wanted
from tests.unit.manifests import made

MANY = 60_000
ALLOWED_S = 1.0
"""Of processor time. In a thread: it was 50 s of the event loop's, and grew with the square."""


def cpu_s(work: Any, *args: Any, **named: Any) -> float:
    began = time.process_time()
    work(*args, **named)
    return time.process_time() - began


def spec(**process: object) -> Spec:
    return Spec({"process": {"args": ["x"], "cwd": "/", **process}})


def facts(**process: object) -> dict[str, str]:
    pod = PodValues(namespace="n", name="pod", uid="uid", ips=["10.0.0.1"], node="node")
    return workload_facts(spec(**process), pod, image_digest="sha256:0")


def test_many_arguments_are_compared_by_digest_and_reported_in_short() -> None:
    began = time.process_time()
    ours, theirs = ([f"{each}{number}" for number in range(MANY)] for each in "ab")
    have, want = facts(args=ours)["args"], facts(args=theirs)["args"]
    assert have != want
    found = Finding("args", 1, have, want, fits=False)
    assert len(str(found)) < 1000
    assert '"sha256":' in str(found)
    assert time.process_time() - began < ALLOWED_S
    assert facts(args=ours)["args"] == have


def test_list_comparison_does_not_grow_with_the_square() -> None:
    have, want = (json.dumps([f"{each}{n}" for n in range(MANY)]) for each in "ab")
    found = Finding("args", 1, have, want, fits=False)
    assert cpu_s(str, found) < ALLOWED_S
    assert len(str(found)) < 1000


def test_short_fact_is_stored_without_a_digest() -> None:
    assert compact(["a"]) == '["a"]'
    assert len(compact(["a" * 20_000])) < 200


def test_service_variables_are_filtered_in_linear_time() -> None:
    names = [
        f"S{number}_SERVICE_{what}" for number in range(MANY // 2) for what in ("HOST", "PORT")
    ]
    assert cpu_s(facts, env=[f"{name}=1" for name in names]) < ALLOWED_S
    assert (
        cpu_s(facts, env=["_PORT" * 200_000 + "=1", "A_SERVICE_HOST=1", "A_SERVICE_PORT=1"]) < 0.3
    )
    kept = json.loads(
        facts(env=["A_SERVICE_HOST=1", "A_SERVICE_PORT=1", "A_PORT=2", "B_PORT=3"])["env"]
    )
    assert list(kept) == ["B_PORT"]


def test_refusal_by_all_checks_is_a_short_text() -> None:
    rows = [Finding(f"code{n}", 1, '"' + "h" * 9999 + '"', "w" * 9999, False) for n in range(40)]
    text = str(Refused(made().id, rows))
    assert len(text) < 8000
    assert "code39" in text


def test_journal_line_has_a_maximum_length() -> None:
    record = logging.makeLogRecord({"msg": "x" * 1_000_000 + "\n", "levelname": "INFO"})
    assert len(OneLine().format(record)) < 9000
    assert cpu_s(OneLine().format, record) < 0.1


def test_long_annotations_are_reported_in_short() -> None:
    with pytest.raises(BadAnnotation) as caught:
        parse({f"quickthaw.io/{'x' * 200_000}": "y" * 200_000}, "main")
    assert len(str(caught.value)) < 2000
    many = {f"quickthaw.io/snapshot.c{n}": f"name-{n}" for n in range(MANY)}
    assert len(wanted(many)) == 16
    assert cpu_s(wanted, many) < 0.1


def test_endless_output_of_a_command_does_not_fill_the_daemon() -> None:
    code = "import sys\nfor _ in range(3000): sys.stdout.write('x' * 65536)\nprint('end')"
    before = memory()["peak_bytes"]
    ended = asyncio.run(tool.run_async([sys.executable, "-c", code], within_s=60))
    assert ended.tail.endswith("end")
    assert len(ended.output) <= 16 << 20
    assert memory()["peak_bytes"] - before < 64 << 20


def test_greatest_step_of_the_event_loop_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    watch = SlowSteps()

    async def work() -> None:
        await asyncio.sleep(0.01)
        began = time.thread_time()
        while time.thread_time() - began < SLOW_S + 0.02:
            pass
        await asyncio.sleep(0)
        await asyncio.to_thread(time.sleep, 0.3)  # nobody is kept waiting by a thread

    with asyncio.Runner(loop_factory=lambda: watched(watch)) as runner:
        runner.run(work())
    told = watch.as_json()
    assert SLOW_S < told["greatest_step_cpu_s"] <= told["greatest_step_s"]
    assert told["greatest_step_cpu_s"] < 0.3
    assert told["slow_steps"] == 1
    assert "the event loop was busy" in caplog.text
