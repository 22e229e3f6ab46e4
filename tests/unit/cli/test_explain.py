"""`quickthaw explain`: for a pod through the daemon, for a spec on the store itself."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

from shim.cli import client, explain_spec, main, offline
from shim.contract.errors import NoSuchPod, NoSuchSnapshot
from shim.daemon.explain import Explaining
from shim.daemon.registry import Registry
from shim.gate import volumecontent
from shim.gate.explain import explained
from shim.node import facts
from shim.store.store import Store
from shim.workload.annotations import Wish
from tests.unit.daemon.test_decision import (
    SPEC,
    a_container,
    a_decider,
    a_manifest,
    identity,
    put,
    store,
)
from tests.unit.specs import CONTENT, NODE, Json, captured, changed, spec, wanted
from tests.unit.trusting import TrustsAll

if TYPE_CHECKING:
    from pathlib import Path

Capsys = pytest.CaptureFixture[str]
__all__ = ["store"]


def answered(
    monkeypatch: pytest.MonkeyPatch, given: Json | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Serves a daemon that explains pod 2 of this spec; records the received requests."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def ask(verb: str, **arguments: Any) -> dict[str, Any]:
        asked.append((verb, arguments))
        container = {"id": "c", "namespace": "models", "pod": "pod-2", "container": "server",
                     "state": "cold", "reason": "no\x1b[2Jluck"}  # fmt: skip
        told = explained(captured(), wanted(given or spec("2")))
        return {"container": container, "chosen": "asked for", **told}

    monkeypatch.setattr(client, "ask", ask)
    return asked


def test_fitting_pod_exits_with_0(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    asked = answered(monkeypatch)
    assert main.main(["explain", "models/pod-2", "--snapshot", "3f2a", "-c", "server"]) == 0
    wanted_of = {"pod": "pod-2", "namespace": "models", "container": "server", "snapshot": "3f2a"}
    assert asked == [("explain", wanted_of)]
    told = capsys.readouterr().out
    assert "fits:" in told
    assert "NO" not in told
    assert "\x1b" not in told, "text that a pod's author chose must not reach the terminal raw"
    for code in ("user", "seccomp", "env", "cpu_features", "memory", "signature"):
        assert f"\n{code}" in told, "what is equal is told, too"


def test_pod_that_does_not_fit_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    other = changed("process/capabilities/bounding", ["CAP_SYS_ADMIN"])
    other["process"]["args"] = ["other"]
    answered(monkeypatch, other)
    assert main.main(["explain", "pod-2"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " NO " in line]
    assert [row[:3] for row in rows] == [["capabilities", "2", "NO"], ["args", "1", "NO"]]
    assert main.main(["explain", "pod-2", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["refused"] == ["capabilities", "args"]


def test_error_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    def ask(_verb: str, **_arguments: Any) -> dict[str, Any]:
        raise NoSuchPod("cannot explain", about="p", why="no such pod", do="Look.")

    monkeypatch.setattr(client, "ask", ask)
    assert main.main(["explain", "p"]) == 2
    assert "no such pod" in capsys.readouterr().err
    assert main.main(["explain", "/nonexistent/config.json"]) == 2


# A spec, without the daemon


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, store: Store, tmp_path: Path) -> Path:
    """Writes a spec of pod 2 as a file, and a store with the snapshot of pod 1."""

    async def learn(_criu: str, _trust: object) -> facts.NodeFacts:
        return facts.NodeFacts(NODE, "")

    monkeypatch.setattr(facts, "learn", learn)
    monkeypatch.setattr(volumecontent, "fact", lambda _spec, _pod: CONTENT)
    monkeypatch.setattr(explain_spec, "Store", lambda: Store(str(tmp_path)))
    monkeypatch.setattr(offline, "trust", lambda _store: TrustsAll())
    # Namespaces of this machine are of no interest here.
    given = spec("2")
    given["linux"]["namespaces"] = [{"type": "pid"}, {"type": "mount"}]
    put(store, captured(given | {"annotations": {}}))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    return path


def explain(path: Path, *more: str) -> int:
    return main.main(["explain", str(path), "--snapshot", "warm", *more])


OF_POD_2 = ("-n", "models", "--pod-name", "pod-1", "--pod-uid", "uid-1", "--pod-ip", "10.0.0.1",
            "--image-digest", "sha256:1")  # fmt: skip


def test_fitting_spec_exits_with_0(on_disk: Path, capsys: Capsys) -> None:
    assert explain(on_disk, *OF_POD_2) == 0
    assert "not known" not in capsys.readouterr().err


def test_fact_that_the_spec_lacks_is_unknown_and_does_not_fit(
    on_disk: Path, capsys: Capsys
) -> None:
    assert explain(on_disk, "--pod-name", "pod-1", "--pod-ip", "10.0.0.1", "--json") == 1
    told = capsys.readouterr()
    refused = json.loads(told.out)["refused"]
    assert {"image_digest", "namespace"} <= set(refused)
    assert "--image-digest" in told.err
    assert "--namespace" in told.err


def test_annotations_of_the_spec_name_its_pod(on_disk: Path, capsys: Capsys) -> None:
    found = json.loads(on_disk.read_text())
    found["annotations"] = {
        f"io.kubernetes.cri.sandbox-{name}": value
        for name, value in (("namespace", "models"), ("name", "pod-1"), ("uid", "uid-1"))
    }
    on_disk.write_text(json.dumps(found))
    assert explain(on_disk, "--pod-ip", "10.0.0.1", "--image-digest", "sha256:1") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"process": 1}', "{" * 100_000])
def test_file_that_is_no_spec_is_an_error(on_disk: Path, capsys: Capsys, content: str) -> None:
    on_disk.write_text(content)
    assert explain(on_disk) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_missing_snapshot_is_an_error(on_disk: Path) -> None:
    assert main.main(["explain", str(on_disk), "--snapshot", "nowhere"]) == 2


# The daemon's side


def ask_daemon(store: Store, wish: Wish, **request: str) -> dict[str, Any]:
    registry = Registry()
    registry.add(a_container(wish))
    explaining = Explaining(store, registry, a_decider(store), Mock(gpu_findings=_no_gpus))
    return dict(asyncio.run(_answer(explaining, {"pod": "pod", **request})))


async def _no_gpus(*_: object) -> list[object]:
    return []


async def _answer(explaining: Explaining, request: dict[str, str]) -> Any:
    return await explaining.verbs()["explain"](request)


def test_the_daemon_compares_with_a_candidate(store: Store) -> None:
    put(store, a_manifest(identity(store)))
    store.read_index()
    told = ask_daemon(store, Wish(snapshot="auto"))
    assert told["fits"], told["refused"]
    assert told["chosen"] == "a candidate of the decision"


def test_without_a_candidate_the_nearest_snapshot_is_compared(store: Store) -> None:
    found = identity(store)
    other = {**found.facts, "args": '["other"]'}
    put(store, a_manifest(found, key="f" * 64, facts=other))
    put(store, a_manifest(found, 1, key="e" * 64, facts={}))
    store.read_index()
    told = ask_daemon(store, Wish(snapshot="auto"))
    assert told["refused"] == ["processes", "descriptors", "args"]
    assert "nearest" in told["chosen"]


def test_snapshot_can_be_named(store: Store) -> None:
    found = a_manifest(identity(store), key="f" * 64, name="warm")
    put(store, found)
    store.read_index()
    told = ask_daemon(store, Wish(snapshot="auto"), snapshot="warm")
    assert told["snapshot"] == found.id
    assert told["refused"] == ["key"]
    with pytest.raises(NoSuchSnapshot):
        ask_daemon(store, Wish(snapshot="auto"), snapshot="other")


def test_missing_snapshots_and_pods_are_reported(store: Store) -> None:
    with pytest.raises(NoSuchSnapshot, match="no snapshots of this namespace"):
        ask_daemon(store, Wish(snapshot="auto"))
    with pytest.raises(NoSuchPod):
        ask_daemon(store, Wish(snapshot="auto"), namespace="elsewhere")
    assert SPEC["process"]
