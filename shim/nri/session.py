"""Runs an NRI plugin's session with its runtime: connects, registers, serves, and begins again.

Each connection has steps: connect, serve the Plugin service on connection 1, register on connection
2, wait for Configure. Then the runtime calls us until either side closes. While there is no
connection, pods start without us, as they do without any plugin.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protos import nri_pb2
from shim.nri.events import Plugin, mask
from shim.nri.service import Handlers, Reports, Runtime, Service, Trouble
from shim.rpc.channel import Channel, Connections, connected
from shim.rpc.errors import CallTooLate, RpcError

log = logging.getLogger(__name__)

DEFAULT_SOCKET: Final = "/var/run/nri/nri.sock"
RUNTIME_SERVICE: Final = "nri.pkg.api.v1alpha1.Runtime"
IDS: Final = Connections(serve_on=1, call_on=2)

_NAME = re.compile(r"[A-Za-z0-9_.+-]+")
_INDEX = re.compile(r"[0-9]{2}")


@dataclass(frozen=True, slots=True)
class Configured:
    """The runtime has accepted us, and has our subscription."""

    runtime: Runtime


@dataclass(frozen=True, slots=True)
class Synchronized:
    """The plugin has taken all pods and containers, or failed to: their numbers. Events follow."""

    pods: int
    containers: int


@dataclass(frozen=True, slots=True)
class Lost:
    """There is no connection. The next attempt comes after `again_s`."""

    why: str
    again_s: float


State = Configured | Synchronized | Lost


@dataclass(frozen=True, slots=True)
class Pace:
    """The times of waiting, in seconds.

    register_s: until we are registered and configured; the runtime takes plugins one at a time, so
    a slow neighbour counts. first_s: before the first retry, doubled with each retry. absent_s: the
    longest back-off while nobody listens, when a retry costs next to nothing. dropped_s: the
    longest back-off when the runtime accepts the connection and drops it again. settled_s: after a
    connection of this length, the back-off begins anew at first_s.
    """

    register_s: float = 20.0
    first_s: float = 0.05
    absent_s: float = 1.0
    dropped_s: float = 30.0
    settled_s: float = 1.0


def _log_state(state: State) -> None:
    match state:
        case Configured(runtime):
            log.info("plugin of %s %s", runtime.name, runtime.version)
        case Synchronized(pods, containers):
            log.info("synchronized with %d pods, %d containers", pods, containers)
        case Lost(why, again_s):
            log.warning("no runtime: %s; next attempt in %.2f s", why, again_s)


def _log_trouble(trouble: Trouble) -> None:
    log.warning("%s", trouble)


async def serve(
    plugin: Plugin,
    *,
    socket: str = DEFAULT_SOCKET,
    name: str,
    index: str,
    on_state: Callable[[State], None] = _log_state,
    on_trouble: Callable[[Trouble], None] = _log_trouble,
    pace: Pace = Pace(),
) -> None:
    """Serve as the plugin `index`-`name` of the runtime at `socket`, until cancelled.

    `index` is two digits: the runtime calls plugins in ascending order. Both callbacks run on the
    event loop and must not block; by default they log. Returns only by cancellation, after the last
    handler has ended. Raises ValueError for a name or index that NRI forbids, and for a plugin that
    handles no event.
    """
    if not _NAME.fullmatch(name) or not _INDEX.fullmatch(index):
        raise ValueError(f"NRI takes no plugin {index}-{name}")
    mask(plugin)
    work = Handlers()
    delay_s = pace.first_s
    clock = asyncio.get_running_loop().time
    try:
        while True:
            session = _Session(plugin, work, on_state, on_trouble)
            began = clock()
            why = await session.run(socket, name, index, pace.register_s)
            if clock() - began >= pace.settled_s:
                delay_s = pace.first_s
            delay_s = min(delay_s, pace.absent_s if isinstance(why, OSError) else pace.dropped_s)
            on_state(Lost(str(why), delay_s))
            await asyncio.sleep(delay_s)
            delay_s *= 2
    finally:
        await work.ended()


class _Session:
    """A connection, from connect to its end."""

    def __init__(
        self,
        plugin: Plugin,
        work: Handlers,
        on_state: Callable[[State], None],
        on_trouble: Callable[[Trouble], None],
    ) -> None:
        self._on_state = on_state
        self._configured = asyncio.Event()
        reports = Reports(self._take_runtime, self._take_sync, on_trouble)
        self._service = Service(plugin, work, reports)

    def _take_runtime(self, runtime: Runtime) -> None:
        self._configured.set()
        self._on_state(Configured(runtime))

    def _take_sync(self, pods: int, containers: int) -> None:
        self._on_state(Synchronized(pods, containers))

    async def run(self, socket: str, name: str, index: str, register_s: float) -> Exception:
        """Serve until the connection ends. Returns the error that ended the connection."""
        try:
            async with connected(socket, IDS, self._service.handle) as channel:
                await self._register(channel, name, index, register_s)
                return await channel.wait_closed()
        except (RpcError, OSError) as why:
            return why

    async def _register(self, channel: Channel, name: str, index: str, register_s: float) -> None:
        request = nri_pb2.RegisterPluginRequest(plugin_name=name, plugin_idx=index)
        payload = request.SerializeToString()
        deadline = asyncio.get_running_loop().time() + register_s
        await channel.call(RUNTIME_SERVICE, "RegisterPlugin", payload, timeout_s=register_s)
        ends = [
            asyncio.ensure_future(self._configured.wait()),
            asyncio.ensure_future(channel.wait_closed()),
        ]
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError as late:
            raise CallTooLate(f"registered, but not configured within {register_s:g} s") from late
        finally:
            for end in ends:
                end.cancel()
