"""Serves the Plugin service of a connection: ttrpc calls to the plugin's methods and back.

The rule: an answer always comes, in time, and is never an error. containerd fails the pod's request
on an error, and drops the plugin when an answer is late. An empty message is a valid answer to
every call and means: nothing to add.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import DecodeError

from protos import nri_pb2
from shim.nri.events import BY_NUMBER, EVENTS, Container, Plugin, Pod, mask
from shim.rpc.errors import CallRefused, Code
from shim.rpc.ttrpc import MAX_MESSAGE_BYTES, PendingCall

log = logging.getLogger(__name__)

SERVICE: Final = "nri.pkg.api.v1alpha1.Plugin"
EMPTY: Final = b""
LARGEST_ANSWER_BYTES: Final = MAX_MESSAGE_BYTES - 64
"""Size of a ttrpc message, less the room around the answer inside."""

BUDGET_SHARE: Final = 0.5
"""Share of the granted time for a handler: the rest is for queues and a busy machine."""

REQUEST_TIMEOUT_S: Final = 2.0
REGISTRATION_TIMEOUT_S: Final = 5.0
"""NRI's defaults, for runtimes that do not name their timeouts (before NRI 0.7)."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The runtime's description of itself in Configure. The versions are for people to read."""

    name: str
    version: str
    nri_version: str
    config: str
    registration_timeout_s: float
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """A handler that failed or was late. `pod`, `container`: ids, empty if there is none.

    late_s: the handler's budget if it was late; then it was cancelled, and `error` is None.
    """

    event: str
    pod: str
    container: str
    error: BaseException | None = None
    late_s: float | None = None

    def __str__(self) -> str:
        about = f" [{self.container or self.pod}]" if self.container or self.pod else ""
        if self.late_s is not None:
            return f"{self.event}{about}: no result within {self.late_s:g} s; answered without"
        return f"{self.event}{about}: {self.error!r}; answered without its result"


@dataclass(frozen=True, slots=True)
class Reports:
    """The callbacks for reports of the service."""

    configured: Callable[[Runtime], None]
    synchronized: Callable[[int, int], None]
    trouble: Callable[[Trouble], None]


class Handlers:
    """The running handlers. Outlives connections: a stuck handler does not delay the next session.

    After the budget, a handler is cancelled, and nobody waits for it but `ended`.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[nri_pb2.ContainerAdjustment | None]] = set()

    async def within(
        self, budget_s: float, handler: Coroutine[None, None, nri_pb2.ContainerAdjustment | None]
    ) -> asyncio.Task[nri_pb2.ContainerAdjustment | None]:
        """Run `handler` and return its task: finished, or past its budget and cancelled."""
        task = asyncio.get_running_loop().create_task(handler)
        self._running.add(task)
        task.add_done_callback(self._done)
        try:
            await asyncio.wait({task}, timeout=budget_s)
        finally:
            task.cancel()
        return task

    def _done(self, task: asyncio.Task[nri_pb2.ContainerAdjustment | None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: an exception after the answer changes nothing

    async def ended(self) -> None:
        """Cancel every handler that still runs and wait until the last is done."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)


class Service:
    """Answers the calls of a connection."""

    def __init__(self, plugin: Plugin, work: Handlers, reports: Reports) -> None:
        self._plugin, self._work, self._reports = plugin, work, reports
        self._events = mask(plugin)
        self._request_timeout_s = REQUEST_TIMEOUT_S
        self._pods: list[Pod] = []
        self._containers: list[Container] = []

    async def handle(self, call: PendingCall) -> bytes:
        """Answer a call. Raises CallRefused only for a call that is not in the protocol."""
        if call.service != SERVICE:
            raise CallRefused(Code.UNIMPLEMENTED, f"service {call.service} is not served here")
        try:
            return await self._dispatch(call)
        except CallRefused:
            raise
        except DecodeError as error:
            log.warning("%s: the message cannot be read (%s); answered empty", call.method, error)
        except Exception:
            # Our own mistake, or a callback's. As an answer to containerd it would stop the pod.
            log.exception("%s failed; answered empty", call.method)
        return EMPTY

    async def _dispatch(self, call: PendingCall) -> bytes:
        match call.method:
            case "Configure":
                return self._configure(nri_pb2.ConfigureRequest.FromString(call.payload))
            case "Synchronize":
                request = nri_pb2.SynchronizeRequest.FromString(call.payload)
                return await self._synchronize(call, request)
            case "CreateContainer":
                return await self._create(call)
            case "UpdateContainer":
                return await self._update(call)
            case "StateChange":
                change = nri_pb2.StateChangeEvent.FromString(call.payload)
                return await self._event(call, BY_NUMBER.get(change.event), change)
            case name if name in EVENTS:
                event = nri_pb2.ContainerEvent.FromString(call.payload)
                return await self._event(call, name, event)
            case "Shutdown":
                return EMPTY  # the end of the connection tells us, with or without this call
            case other:
                raise CallRefused(Code.UNIMPLEMENTED, f"method {other} is not served here")

    def _configure(self, request: nri_pb2.ConfigureRequest) -> bytes:
        self._request_timeout_s = request.request_timeout / 1000 or REQUEST_TIMEOUT_S
        runtime = Runtime(
            name=request.runtime_name,
            version=request.runtime_version,
            nri_version=request.nri_version,
            config=request.config,
            registration_timeout_s=request.registration_timeout / 1000 or REGISTRATION_TIMEOUT_S,
            request_timeout_s=self._request_timeout_s,
        )
        self._reports.configured(runtime)
        return nri_pb2.ConfigureResponse(events=self._events).SerializeToString()

    async def _synchronize(self, call: PendingCall, request: nri_pb2.SynchronizeRequest) -> bytes:
        self._pods += request.pods
        self._containers += request.containers
        if request.more:
            return nri_pb2.SynchronizeResponse(more=True).SerializeToString()
        pods, containers, self._pods, self._containers = self._pods, self._containers, [], []
        about = Trouble(call.method, "", "")
        await self._run(call, about, self._plugin.synchronize(pods, containers))
        self._reports.synchronized(len(pods), len(containers))
        return EMPTY

    async def _create(self, call: PendingCall) -> bytes:
        request = nri_pb2.CreateContainerRequest.FromString(call.payload)
        handler = self._plugin.create_container(request.pod, request.container)
        about = Trouble(call.method, request.pod.id, request.container.id)
        adjustment = await self._run(call, about, handler)
        if adjustment is None:
            return EMPTY
        # Not in the channel, which can only refuse: the pod must start without an adjustment.
        answer = nri_pb2.CreateContainerResponse(adjust=adjustment).SerializeToString()
        if len(answer) > LARGEST_ANSWER_BYTES:
            raise ValueError(f"adjustment of {len(answer)} bytes; {LARGEST_ANSWER_BYTES} at most")
        return answer

    async def _update(self, call: PendingCall) -> bytes:
        request = nri_pb2.UpdateContainerRequest.FromString(call.payload)
        about = Trouble(call.method, request.pod.id, request.container.id)
        handler = self._plugin.update_container(
            request.pod, request.container, request.linux_resources
        )
        await self._run(call, about, handler)
        return EMPTY

    async def _event(
        self,
        call: PendingCall,
        name: str | None,
        request: nri_pb2.StateChangeEvent | nri_pb2.ContainerEvent,
    ) -> bytes:
        if name is None:
            return EMPTY  # of a newer NRI
        event = EVENTS[name]
        subject = (request.pod, request.container) if event.of_container else (request.pod,)
        handler = getattr(self._plugin, event.method)(*subject)
        await self._run(call, Trouble(name, request.pod.id, request.container.id), handler)
        return EMPTY

    async def _run(
        self,
        call: PendingCall,
        about: Trouble,
        handler: Coroutine[None, None, nri_pb2.ContainerAdjustment | None],
    ) -> nri_pb2.ContainerAdjustment | None:
        """Returns the handler's result, or reports and returns None. about: without a cause."""
        granted_s = min(call.timeout_s or self._request_timeout_s, self._request_timeout_s)
        budget_s = granted_s * BUDGET_SHARE
        task = await self._work.within(budget_s, handler)
        if not task.done():
            self._reports.trouble(replace(about, late_s=budget_s))
        elif task.cancelled():
            self._reports.trouble(replace(about, error=asyncio.CancelledError()))
        elif error := task.exception():
            self._reports.trouble(replace(about, error=error))
        else:
            return task.result()
        return None
