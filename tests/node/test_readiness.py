"""The time of a capture, the calls around it, and the facts that a restored container learns."""

import time
from dataclasses import dataclass

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    PORT,
    answer,
    ask,
    assert_cold,
    captured,
    first_answer,
    lines_about,
    probe,
    published,
    restored,
    said,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

NOT_YET_S = 0.6
"""How long a container that is not ready is watched; most conditions are looked at every 0.1 s."""


@dataclass(frozen=True)
class Form:
    """A form of `capture-when`, for a probe on `port`, and the request that makes the probe
    ready.
    """

    port: int
    value: str
    meet: str


FORMS = {
    "http": Form(8000, "http://:8000/health", "/ready"),
    "tcp": Form(8001, "tcp://:8011", "/listen?host=0.0.0.0&port=8011"),
    "file": Form(8002, "file:/srv/ready", "/write?path=/srv/ready&size=1"),
    "exec": Form(8003, "exec:test -e /srv/ready", "/write?path=/srv/ready&size=1"),
    "log": Form(8004, "log:model [a-z]+ loaded$", "/log?text=model%20probe%20loaded"),
    "signal": Form(8005, "signal", "/ready"),
}
"""One container of a pod each. The annotation without a container's name is for none of them."""


def test_containers_are_captured_only_when_they_are_ready(swap_node: Node) -> None:
    specs = [
        probe(name=name, env={"CASE": name, "WARM": "0", "PORT": str(form.port)})
        for name, form in FORMS.items()
    ]
    by_container = {f"capture_when.{name}": form.value for name, form in FORMS.items()}
    annotations = wishes(capture_when="file:/never", **by_container)
    pod = swap_node.kubelet.run_pod("source", specs, annotations=annotations)
    for name, form in FORMS.items():
        pod.container(name).wait_log("ready ")
        assert ask(pod, "/state", port=form.port)["requests"] >= 1
    time.sleep(NOT_YET_S)
    for name, form in FORMS.items():
        about = lines_about(swap_node, pod.container(name))
        assert not any("captured" in line for line in about), (name, about)
        ask(pod, form.meet, port=form.port)
        assert published(pod, name)


# Quiesce and resume


def called(pod: Pod) -> list[str]:
    """Returns the calls that the probe got by HTTP, in order."""
    names: list[str] = ask(pod, "/called")
    return names


def test_http_calls_precede_and_follow_a_capture_and_follow_a_restore(swap_node: Node) -> None:
    spec = probe(env={"CASE": "http calls"})
    annotations = wishes(
        quiesce=f"http POST :{PORT}/quiesce?level=1", resume=f"http POST :{PORT}/resume"
    )
    source = captured(swap_node, spec, annotations=annotations).source
    assert called(source) == ["quiesce", "resume"]
    pod = restored(swap_node, spec, annotations=annotations)
    assert called(pod) == ["quiesce", "resume"], "it was captured between the two"
    assert called(source) == ["quiesce", "resume"]


def test_exec_calls_precede_and_follow_a_capture_and_follow_a_restore(swap_node: Node) -> None:
    spec = probe(env={"CASE": "exec calls"})
    annotations = wishes(
        quiesce="exec:sh -c 'echo quiesce >> /srv/calls'",
        resume="exec:sh -c 'echo resume >> /srv/calls'",
    )
    source = captured(swap_node, spec, annotations=annotations).source
    pod = restored(swap_node, spec, annotations=annotations)
    for each in (source, pod):
        assert ask(each, "/read?path=/srv/calls")["text"] == "quiesce\nresume\n"


@pytest.mark.parametrize("call", ["http POST :8000/quiesce", "exec:sh -c 'echo no >&2; exit 3'"])
def test_failing_quiesce_leaves_the_source_serving(swap_node: Node, call: str) -> None:
    spec = probe(env={"CASE": f"failing {call}"})
    annotations = wishes(capture_when="signal", quiesce=call, resume=f"http POST :{PORT}/resume")
    pod = swap_node.kubelet.run_pod("source", [spec], annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    ask(pod, "/prepare?quiesce=500")
    ask(pod, "/ready")
    line = said(swap_node, pod.container().id[:12], "no snapshot was made")
    assert "quiesce" in line
    assert "status 500" in line or "no" in line
    assert called(pod)[-1:] == ["resume"], "it may have quiesced in part"
    assert ask(pod, "/count")["counter"] == 1
    assert ask(pod, "/state")["nonce"] == nonce


def test_failing_resume_on_the_source_leaves_it_serving(swap_node: Node) -> None:
    spec = probe(env={"CASE": "resume fails on the source"})
    annotations = wishes(capture_when="signal", resume=f"http POST :{PORT}/resume")
    pod = swap_node.kubelet.run_pod("source", [spec], annotations=annotations)
    first_answer(pod)
    ask(pod, "/prepare?resume=503")
    ask(pod, "/ready")
    assert "status 503" in said(swap_node, pod.container().id[:12], "no snapshot was made")
    assert ask(pod, "/count")["counter"] == 1


def test_failing_resume_at_restore_is_a_cold_start(swap_node: Node) -> None:
    spec = probe(env={"CASE": "resume fails at restore"})
    annotations = wishes(resume="exec:test ! -e /run/quickthaw/restored.json")
    snapshot = captured(swap_node, spec, annotations=annotations)
    pod = swap_node.kubelet.run_pod("replica", [spec], annotations=annotations)
    assert_cold(pod.container())
    state = first_answer(pod)
    assert state["nonce"] != snapshot.nonce
    assert answer(pod, "/restored").json() is None, "a cold start is not told of a restore"
    line = said(swap_node, pod.container().id[:12], "the resume call failed")
    assert "starts cold" in line


# restored.json


def told_spec(pod_name: str) -> ContainerSpec:
    """Returns a probe with a variable that is another in each pod."""
    return probe(env={"CASE": "told", "POD_NAME": pod_name})


def test_restored_process_can_read_its_new_names_and_environment(swap_node: Node) -> None:
    snapshot = captured(swap_node, told_spec("source"), namespace="team")
    assert ask(snapshot.source, "/restored") is None
    pod = restored(swap_node, told_spec("replica-7"), name="replica-7", namespace="team")
    told = ask(pod, "/restored")
    environment = told.pop("environment")
    away_s = told.pop("away_s")
    assert told == {
        "schema": 1,
        "snapshot": snapshot.id,
        "pod": "replica-7",
        "namespace": "team",
        "uid": pod.uid,
        "container": "main",
        "ips": list(pod.ips),
        "hostname": "replica-7",
        "gpus": {},
    }
    assert 0 < away_s < time.time() - snapshot.manifest()["created_at"] + 1
    assert environment["POD_NAME"] == environment["HOSTNAME"] == "replica-7"
    assert environment["CASE"] == "told"
    # The environment proper is the captured environment: nobody can change that of a running
    # process.
    assert ask(pod, "/env")["environ"]["POD_NAME"] == "source"
    assert ask(pod, "/read?path=/run/quickthaw/restored.json")["mode"] == "0o400"
