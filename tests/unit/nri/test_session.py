import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from google.protobuf.message import Message

from protos import nri_pb2
from shim.nri.events import EVENTS, Container, Plugin, Pod, mask
from shim.nri.service import SERVICE, Trouble
from shim.nri.session import (
    RUNTIME_SERVICE,
    Configured,
    Lost,
    Pace,
    State,
    Synchronized,
    serve,
)
from shim.rpc import mux
from shim.rpc.channel import Channel, Connections, PeerLimits
from shim.rpc.errors import CallRefused, Code
from shim.rpc.ttrpc import FRAME, PendingCall

POD = nri_pb2.PodSandbox(id="p1", name="web", annotations={"quickthaw.io/snapshot": "auto"})
CONTAINER = nri_pb2.Container(id="c1", pod_sandbox_id="p1", name="main")
S = TypeVar("S", Configured, Synchronized, Lost)
FAST = Pace(register_s=2, first_s=0.001, absent_s=0.002, dropped_s=0.004, settled_s=60)


class Recorder(Plugin):
    """Takes every event and answers CreateContainer with an annotation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        self.seen.append(("synchronize", f"{len(pods)}/{len(containers)}"))

    async def run_pod_sandbox(self, pod: Pod) -> None:
        self.seen.append(("run_pod_sandbox", pod.id))

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        self.seen.append(("stop_pod_sandbox", pod.id))

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        self.seen.append(("remove_pod_sandbox", pod.id))

    async def create_container(
        self, pod: Pod, container: Container
    ) -> nri_pb2.ContainerAdjustment | None:
        self.seen.append(("create_container", container.id))
        return nri_pb2.ContainerAdjustment(annotations={"a": pod.name})

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        self.seen.append(("post_create_container", container.id))

    async def start_container(self, pod: Pod, container: Container) -> None:
        self.seen.append(("start_container", container.id))

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        self.seen.append(("post_start_container", container.id))

    async def update_container(
        self, pod: Pod, container: Container, resources: nri_pb2.LinuxResources
    ) -> None:
        self.seen.append(("update_container", f"{container.id} {resources.cpu.cpus}"))

    async def post_update_container(self, pod: Pod, container: Container) -> None:
        self.seen.append(("post_update_container", container.id))

    async def stop_container(self, pod: Pod, container: Container) -> None:
        self.seen.append(("stop_container", container.id))

    async def remove_container(self, pod: Pod, container: Container) -> None:
        self.seen.append(("remove_container", container.id))


class FakeRuntime:
    """The runtime's end of NRI on a real socket: `plugin` is the connection of the day."""

    def __init__(self) -> None:
        self.registered: asyncio.Queue[nri_pb2.RegisterPluginRequest] = asyncio.Queue()
        self.connections: asyncio.Queue[Channel] = asyncio.Queue()
        self.refuse = False

    def accept(self) -> Channel:
        ids = Connections(serve_on=2, call_on=1)
        channel = Channel(ids, self._serve, lambda *_: None, PeerLimits())
        self.connections.put_nowait(channel)
        return channel

    async def _serve(self, call: PendingCall) -> bytes:
        assert (call.service, call.method) == (RUNTIME_SERVICE, "RegisterPlugin")
        if self.refuse:
            raise CallRefused(Code.INVALID_ARGUMENT, "no")
        self.registered.put_nowait(nri_pb2.RegisterPluginRequest.FromString(call.payload))
        return b""


async def tell(channel: Channel, method: str, request: Message, *, timeout_s: float = 2) -> bytes:
    return await channel.call(SERVICE, method, request.SerializeToString(), timeout_s=timeout_s)


class Session:
    """A plugin that serves, its runtime, and the received reports."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.runtime = FakeRuntime()
        self.states: asyncio.Queue[State] = asyncio.Queue()
        self.troubles: list[Trouble] = []

    async def state(self, kind: type[S]) -> S:
        """Returns the next state of this kind; skips earlier states."""
        while True:
            state = await self.states.get()
            if isinstance(state, kind):
                return state

    async def up(self, **configure: int) -> Channel:
        """Take the plugin's next connection through registration and Configure."""
        channel = await self.runtime.connections.get()
        await self.runtime.registered.get()
        request = nri_pb2.ConfigureRequest(
            runtime_name="fake",
            request_timeout=configure.get("request_timeout", 0),
            registration_timeout=configure.get("registration_timeout", 0),
        )
        await tell(channel, "Configure", request)
        return channel


def run(plugin: Plugin, tmp_path: Path, test: Callable[[Session], Awaitable[None]]) -> Session:
    async def limited() -> Session:
        session = Session(str(tmp_path / "nri.sock"))
        async with asyncio.timeout(20), listening(session), serving(plugin, session):
            await test(session)
        return session

    return asyncio.run(limited())


@asynccontextmanager
async def listening(session: Session) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(session.runtime.accept, session.path)
    try:
        yield
    finally:
        server.close()


@asynccontextmanager
async def serving(plugin: Plugin, session: Session) -> AsyncIterator[None]:
    task = asyncio.create_task(
        serve(
            plugin,
            socket=session.path,
            name="quickthaw",
            index="10",
            on_state=session.states.put_nowait,
            on_trouble=session.troubles.append,
            pace=FAST,
        )
    )
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# ---- registration ----


def test_a_plugin_registers_with_its_name_and_index(tmp_path: Path) -> None:
    async def test(session: Session) -> None:
        request = await session.runtime.registered.get()
        assert (request.plugin_name, request.plugin_idx) == ("quickthaw", "10")

    run(Recorder(), tmp_path, test)


def test_configure_subscribes_to_what_the_plugin_handles(tmp_path: Path) -> None:
    class Two(Plugin):
        async def run_pod_sandbox(self, pod: Pod) -> None: ...
        async def remove_container(self, pod: Pod, container: Container) -> None: ...

    async def test(session: Session) -> None:
        channel = await session.runtime.connections.get()
        await session.runtime.registered.get()
        answer = await tell(channel, "Configure", nri_pb2.ConfigureRequest(runtime_name="fake"))
        events = nri_pb2.ConfigureResponse.FromString(answer).events
        assert events == 1 << (nri_pb2.RUN_POD_SANDBOX - 1) | 1 << (nri_pb2.REMOVE_CONTAINER - 1)

    run(Two(), tmp_path, test)


def test_subscriptions_stay_within_the_events_of_the_oldest_runtime() -> None:
    assert mask(Recorder()) == (1 << 11) - 1


def test_a_plugin_that_handles_nothing_is_refused_before_it_connects() -> None:
    with pytest.raises(ValueError, match="handles no event"):
        asyncio.run(serve(Plugin(), socket="/nowhere", name="x", index="10"))


@pytest.mark.parametrize(("name", "index"), [("", "10"), ("a b", "10"), ("a", "1"), ("a", "100")])
def test_a_name_or_index_that_nri_forbids_is_refused(name: str, index: str) -> None:
    with pytest.raises(ValueError, match="takes no plugin"):
        asyncio.run(serve(Recorder(), socket="/nowhere", name=name, index=index))


@pytest.mark.parametrize(
    ("configure", "granted"),
    [({}, (5.0, 2.0)), ({"registration_timeout": 7000, "request_timeout": 500}, (7.0, 0.5))],
    ids=["not told", "told"],
)
def test_granted_times_come_from_the_runtime_or_the_defaults(
    tmp_path: Path, configure: dict[str, int], granted: tuple[float, float]
) -> None:
    async def test(session: Session) -> None:
        await session.up(**configure)
        runtime = (await session.state(Configured)).runtime
        assert (runtime.registration_timeout_s, runtime.request_timeout_s) == granted
        assert runtime.name == "fake"

    run(Recorder(), tmp_path, test)


def test_refused_registration_is_retried(tmp_path: Path) -> None:
    async def test(session: Session) -> None:
        session.runtime.refuse = True
        assert "INVALID_ARGUMENT" in (await session.state(Lost)).why
        session.runtime.refuse = False
        while not session.runtime.connections.empty():
            session.runtime.connections.get_nowait()
        await session.runtime.registered.get()

    run(Recorder(), tmp_path, test)


# ---- events ----


def test_synchronize_in_parts_reaches_the_plugin_once_and_whole(tmp_path: Path) -> None:
    plugin = Recorder()

    async def test(session: Session) -> None:
        channel = await session.up()
        part = nri_pb2.SynchronizeRequest(pods=[POD], containers=[CONTAINER], more=True)
        answer = nri_pb2.SynchronizeResponse.FromString(await tell(channel, "Synchronize", part))
        assert answer.more
        assert plugin.seen == []
        last = nri_pb2.SynchronizeRequest(containers=[CONTAINER])
        answer = nri_pb2.SynchronizeResponse.FromString(await tell(channel, "Synchronize", last))
        assert not answer.more
        assert await session.state(Synchronized) == Synchronized(1, 2)

    run(plugin, tmp_path, test)
    assert plugin.seen == [("synchronize", "1/2")]


@pytest.mark.parametrize("name", [name for name in EVENTS if name != "UpdateContainer"])
@pytest.mark.parametrize("own_method", [False, True], ids=["StateChange", "own method"])
def test_every_event_reaches_its_handler_by_both_methods(
    tmp_path: Path, name: str, own_method: bool
) -> None:
    plugin = Recorder()
    event = EVENTS[name]

    async def test(session: Session) -> None:
        channel = await session.up()
        if own_method:
            request = nri_pb2.ContainerEvent(pod=POD, container=CONTAINER)
            await tell(channel, name, request)
        else:
            change = nri_pb2.StateChangeEvent(pod=POD, container=CONTAINER)
            change.event = nri_pb2.Event.ValueType(event.number)
            await tell(channel, "StateChange", change)
        # Answered only after the handler has returned.
        assert plugin.seen == [(event.method, "c1" if event.of_container else "p1")]

    session = run(plugin, tmp_path, test)
    assert session.troubles == []


def test_an_adjustment_is_the_answer_to_create_container(tmp_path: Path) -> None:
    async def test(session: Session) -> None:
        channel = await session.up()
        request = nri_pb2.CreateContainerRequest(pod=POD, container=CONTAINER)
        answer = await tell(channel, "CreateContainer", request)
        adjust = nri_pb2.CreateContainerResponse.FromString(answer).adjust
        assert dict(adjust.annotations) == {"a": "web"}

    run(Recorder(), tmp_path, test)


def test_an_update_carries_the_resources(tmp_path: Path) -> None:
    plugin = Recorder()

    async def test(session: Session) -> None:
        channel = await session.up()
        resources = nri_pb2.LinuxResources(cpu=nri_pb2.LinuxCPU(cpus="0-1"))
        request = nri_pb2.UpdateContainerRequest(
            pod=POD, container=CONTAINER, linux_resources=resources
        )
        assert await tell(channel, "UpdateContainer", request) == b""

    run(plugin, tmp_path, test)
    assert plugin.seen == [("update_container", "c1 0-1")]


def test_unknown_events_and_methods_of_a_newer_runtime_stop_nothing(tmp_path: Path) -> None:
    async def test(session: Session) -> None:
        channel = await session.up()
        change = nri_pb2.StateChangeEvent(event=nri_pb2.POST_UPDATE_POD_SANDBOX, pod=POD)
        assert await tell(channel, "StateChange", change) == b""
        with pytest.raises(CallRefused) as refused:
            await tell(channel, "ThawPodSandbox", nri_pb2.Empty())
        assert refused.value.code == Code.UNIMPLEMENTED
        # Field 99 of the request and of the pod in it.
        strange = b"\x9a\x06\x01x" + b"\x0a\x08\x0a\x02p1\x9a\x06\x01x"
        answer = await channel.call(SERVICE, "CreateContainer", strange, timeout_s=2)
        assert nri_pb2.CreateContainerResponse.FromString(answer).HasField("adjust")
        assert await tell(channel, "Shutdown", nri_pb2.Empty()) == b""

    session = run(Recorder(), tmp_path, test)
    assert session.troubles == []


# ---- handlers that fail ----


class Broken(Plugin):
    """Handlers that raise, hang, hang on although cancelled, or return too much."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.cancelled = False

    async def run_pod_sandbox(self, pod: Pod) -> None:
        raise LookupError(pod.id)

    async def create_container(
        self, pod: Pod, container: Container
    ) -> nri_pb2.ContainerAdjustment | None:
        match container.id:
            case "large":
                return nri_pb2.ContainerAdjustment(annotations={"a": "x" * (5 << 20)})
            case "wrong":
                return 7  # type: ignore[return-value]
            case _:
                pass
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return None

    async def stop_container(self, pod: Pod, container: Container) -> None:
        while not self.release.is_set():
            with suppress(asyncio.CancelledError):
                await self.release.wait()


def test_raising_handler_is_reported_and_gets_a_default_answer(tmp_path: Path) -> None:
    async def test(session: Session) -> None:
        channel = await session.up()
        assert await tell(channel, "RunPodSandbox", nri_pb2.PodEvent(pod=POD)) == b""
        (trouble,) = session.troubles
        assert (trouble.event, trouble.pod, trouble.container) == ("RunPodSandbox", "p1", "")
        assert isinstance(trouble.error, LookupError)
        assert "LookupError" in str(trouble)

    run(Broken(), tmp_path, test)


@pytest.mark.parametrize("request_timeout", [100, 60_000], ids=["granted", "of the call"])
def test_late_handler_gets_a_default_answer_at_half_time_and_is_cancelled(
    tmp_path: Path, request_timeout: int
) -> None:
    plugin = Broken()

    async def test(session: Session) -> None:
        channel = await session.up(request_timeout=request_timeout)
        request = nri_pb2.CreateContainerRequest(pod=POD, container=CONTAINER)
        # The call waits for the shorter of both: 0.1 s.
        timeout_s = 5 if request_timeout == 100 else 0.1
        assert await tell(channel, "CreateContainer", request, timeout_s=timeout_s) == b""
        assert [trouble.late_s for trouble in session.troubles] == [0.05]
        assert "c1" in str(session.troubles[0])

    run(plugin, tmp_path, test)
    assert plugin.cancelled


def test_uncancellable_handler_delays_neither_events_nor_reconnect(
    tmp_path: Path,
) -> None:
    plugin = Broken()

    async def test(session: Session) -> None:
        channel = await session.up(request_timeout=50)
        request = nri_pb2.StopContainerRequest(pod=POD, container=CONTAINER)
        assert await tell(channel, "StopContainer", request) == b""
        assert await tell(channel, "StopContainer", request) == b""
        channel.close()
        await session.up()
        assert len(session.troubles) == 2
        plugin.release.set()

    run(plugin, tmp_path, test)


@pytest.mark.parametrize("answer", ["large", "wrong"])
def test_an_answer_that_cannot_be_sent_leaves_the_container_as_it_is(
    tmp_path: Path, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(session: Session) -> None:
        channel = await session.up()
        container = nri_pb2.Container(id=answer)
        request = nri_pb2.CreateContainerRequest(pod=POD, container=container)
        assert await tell(channel, "CreateContainer", request) == b""

    run(Broken(), tmp_path, test)
    assert "CreateContainer failed" in caplog.text


def test_request_that_is_no_protobuf_gets_an_empty_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(session: Session) -> None:
        channel = await session.up()
        assert await channel.call(SERVICE, "CreateContainer", b"\xff", timeout_s=2) == b""

    run(Recorder(), tmp_path, test)
    assert "cannot be read" in caplog.text


# ---- connections that fail ----


def test_plugin_waits_for_a_runtime_that_starts_later(tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(str(tmp_path / "nri.sock"))
        async with asyncio.timeout(20), serving(Recorder(), session):
            assert isinstance(await session.states.get(), Lost)
            assert isinstance(await session.states.get(), Lost)
            async with listening(session):
                await session.up()
                await session.state(Configured)

    asyncio.run(main())


def test_plugin_joins_a_restarted_runtime_and_synchronizes_again(tmp_path: Path) -> None:
    plugin = Recorder()

    async def test(session: Session) -> None:
        for _ in range(3):
            channel = await session.up()
            await tell(channel, "Synchronize", nri_pb2.SynchronizeRequest(pods=[POD]))
            channel.close()
            await session.state(Lost)

    run(plugin, tmp_path, test)
    assert plugin.seen == [("synchronize", "1/0")] * 3


def test_parts_of_a_synchronize_do_not_survive_their_connection(tmp_path: Path) -> None:
    plugin = Recorder()

    async def test(session: Session) -> None:
        channel = await session.up()
        part = nri_pb2.SynchronizeRequest(pods=[POD], more=True)
        await tell(channel, "Synchronize", part)
        channel.close()
        channel = await session.up()
        await tell(channel, "Synchronize", nri_pb2.SynchronizeRequest())

    run(plugin, tmp_path, test)
    assert plugin.seen == [("synchronize", "0/0")]


@pytest.mark.parametrize(
    "wire",
    [mux.HEADER.pack(1, (1 << 24) + 1), mux.encode(1, FRAME.pack(1 << 31, 1, 1, 0)), b"\xff" * 64],
    ids=["mux", "ttrpc", "garbage"],
)
def test_a_malformed_frame_ends_the_connection_and_begins_the_next(
    tmp_path: Path, wire: bytes
) -> None:
    async def main() -> None:
        session = Session(str(tmp_path / "nri.sock"))
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(session.path)
            listener.listen()
            listener.setblocking(False)
            async with asyncio.timeout(20), serving(Recorder(), session):
                for _ in range(2):
                    connection, _ = await loop.sock_accept(listener)
                    with connection:
                        await loop.sock_sendall(connection, wire)
                        assert "frame of" in (await session.state(Lost)).why

    asyncio.run(main())


def test_back_off_grows_and_stays_below_its_limit(tmp_path: Path) -> None:
    async def main() -> list[float]:
        session = Session(str(tmp_path / "nri.sock"))
        async with asyncio.timeout(20), serving(Recorder(), session):
            return [(await session.state(Lost)).again_s for _ in range(4)]

    assert asyncio.run(main()) == [0.001, 0.002, 0.002, 0.002]


def test_runtime_that_never_configures_is_left_and_retried(tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(str(tmp_path / "nri.sock"))
        impatient = Pace(register_s=0.05, first_s=0.001, absent_s=0.001, dropped_s=0.001)
        async with asyncio.timeout(20), listening(session):
            task = asyncio.create_task(
                serve(
                    Recorder(),
                    socket=session.path,
                    name="quickthaw",
                    index="10",
                    on_state=session.states.put_nowait,
                    pace=impatient,
                )
            )
            assert "not configured within" in (await session.state(Lost)).why
            await session.runtime.registered.get()
            await session.runtime.registered.get()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(main())
