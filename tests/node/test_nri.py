"""The NRI session against real containerds: every event of a pod, and failures on our side."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from protos import nri_pb2
from shim.nri.events import Container, Plugin, Pod
from shim.nri.service import Trouble
from shim.nri.session import Lost, State, Synchronized, serve
from tests.node.node import Node
from tests.node.podspec import ContainerSpec

SOCKET = "/run/nri/nri.sock"
WITHIN_S = 30
LARGE = "x" * 20_000
"""Far beyond the 4096 bytes that NRI's reader takes as the first frame of a message."""


@pytest.fixture(autouse=True)
def nothing_stays_behind(node: Node) -> Iterator[None]:
    before = node.inventory()
    yield
    node.kubelet.remove_pods()
    assert node.inventory().less(before) == {}, "this test left something on the node"


class Watcher(Plugin):
    """Records the received events of a single pod. `creating` is the action in CreateContainer."""

    def __init__(self, pod: str, creating: str = "adjusts") -> None:
        self.pod, self.creating = pod, creating
        self.events: list[str] = []
        self.synchronized: list[tuple[set[str], set[str]]] = []
        self.annotations: dict[str, str] = {}
        self.states: list[State] = []
        self.troubles: list[Trouble] = []
        self.changed = threading.Condition()

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        ids = {container.id for container in containers}
        self.synchronized.append(({pod.name for pod in pods}, ids))

    def note(self, event: str, pod: Pod) -> None:
        if pod.name == self.pod:
            self.events.append(event)

    async def run_pod_sandbox(self, pod: Pod) -> None:
        self.note("run pod", pod)
        self.annotations = dict(pod.annotations)

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        self.note("stop pod", pod)

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        self.note("remove pod", pod)

    async def create_container(
        self, pod: Pod, container: Container
    ) -> nri_pb2.ContainerAdjustment | None:
        self.note("create", pod)
        match self.creating:
            case "raises":
                raise LookupError("a test")
            case "hangs":
                await asyncio.Event().wait()
            case "blocks":
                time.sleep(3)  # noqa: ASYNC251  (longer than containerd waits: the mistake to survive)
            case _:
                pass
        hooks = nri_pb2.Hooks(prestart=[nri_pb2.Hook(path="/bin/true", args=["true", "x"])])
        mount = nri_pb2.Mount(
            destination="/added", type="bind", source="/srv", options=["rbind", "ro"]
        )
        return nri_pb2.ContainerAdjustment(
            annotations={"org.criu.config": "/some/file"},
            env=[nri_pb2.KeyValue(key="LARGE", value=LARGE)],
            hooks=hooks,
            mounts=[mount],
        )

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        self.note("created", pod)

    async def start_container(self, pod: Pod, container: Container) -> None:
        self.note("start", pod)

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        self.note("started", pod)

    async def stop_container(self, pod: Pod, container: Container) -> None:
        self.note("stop", pod)

    async def remove_container(self, pod: Pod, container: Container) -> None:
        self.note("remove", pod)

    def take_state(self, state: State) -> None:
        with self.changed:
            self.states.append(state)
            self.changed.notify_all()

    def take_trouble(self, trouble: Trouble) -> None:
        self.troubles.append(trouble)

    def await_state(self, kind: type[State], times: int = 1) -> None:
        """Wait until this state was there `times` times since the plugin serves."""

        def reached() -> bool:
            return sum(isinstance(state, kind) for state in self.states) >= times

        with self.changed:
            assert self.changed.wait_for(reached, WITHIN_S), self.states


@contextmanager
def plugin(node: Node, watcher: Watcher) -> Iterator[Watcher]:
    """Runs `watcher` as a plugin of the node's containerd, on a thread of its own; synchronized."""
    loop = asyncio.new_event_loop()
    serving = loop.create_task(
        serve(
            watcher,
            socket=str(node.path(SOCKET)),
            name="watcher",
            index="10",
            on_state=watcher.take_state,
            on_trouble=watcher.take_trouble,
        )
    )
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait({serving})))
    thread.start()
    try:
        watcher.await_state(Synchronized)
        yield watcher
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()
        loop.close()
    assert serving.cancelled(), serving.exception()


def sleeper(image: str) -> ContainerSpec:
    return ContainerSpec(image, args=["-c", "sleep 1000"])


def test_all_events_of_a_pod_arrive_in_order(node: Node, shell_image: str) -> None:
    with plugin(node, Watcher("events")) as watcher:
        pod = node.kubelet.run_pod(
            "events", [sleeper(shell_image)], annotations={"quickthaw.io/snapshot": "auto"}
        )
        pod.remove(grace_s=0)
    life = ["run pod", "create", "created", "start", "started"]
    assert watcher.events == [*life, "stop", "stop pod", "remove", "remove pod"]
    assert watcher.annotations["quickthaw.io/snapshot"] == "auto"
    assert watcher.troubles == []


def test_adjustment_of_any_size_reaches_the_spec_of_the_container(
    node: Node, shell_image: str
) -> None:
    node.path("/srv").mkdir(exist_ok=True)
    with plugin(node, Watcher("adjusted")):
        pod = node.kubelet.run_pod("adjusted", [sleeper(shell_image)])
        spec = pod.container().info()["runtimeSpec"]
        assert spec["annotations"]["org.criu.config"] == "/some/file"
        assert f"LARGE={LARGE}" in spec["process"]["env"]
        assert {"path": "/bin/true", "args": ["true", "x"]} in spec["hooks"]["prestart"]
        assert "/added" in {mount["destination"] for mount in spec["mounts"]}


@pytest.mark.parametrize("creating", ["raises", "hangs"])
def test_failing_handler_is_reported_and_the_pod_runs(
    node: Node, shell_image: str, creating: str
) -> None:
    with plugin(node, Watcher(creating, creating)) as watcher:
        pod = node.kubelet.run_pod(creating, [sleeper(shell_image)])
        assert pod.container().running
        assert "org.criu.config" not in pod.container().info()["runtimeSpec"]["annotations"]
    assert [trouble.container for trouble in watcher.troubles] == [pod.container().id]
    assert watcher.events == ["run pod", "create", "created", "start", "started"]
    assert not any(isinstance(state, Lost) for state in watcher.states)


def test_containerd_drops_a_blocking_plugin_which_reconnects_and_the_pod_runs(
    node: Node, shell_image: str
) -> None:
    with plugin(node, Watcher("blocks", "blocks")) as watcher:
        pod = node.kubelet.run_pod("blocks", [sleeper(shell_image)])
        assert pod.container().running
        watcher.await_state(Synchronized, times=2)
        pods, containers = watcher.synchronized[-1]
        assert "blocks" in pods
        assert pod.container().id in containers


def test_plugin_joins_a_restarted_containerd_and_learns_of_running_containers(
    node: Node, shell_image: str
) -> None:
    with plugin(node, Watcher("after")) as watcher:
        before = node.kubelet.run_pod("before", [sleeper(shell_image)])
        node.restart_containerd()
        watcher.await_state(Synchronized, times=2)
        assert watcher.synchronized[-1] == ({"before"}, {before.container().id})
        node.kubelet.run_pod("after", [sleeper(shell_image)])
        assert watcher.events == ["run pod", "create", "created", "start", "started"]
