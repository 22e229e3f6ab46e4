"""The way `driver`: what the CUDA driver stages is ordinary memory, and travels with it. Lean.

Nothing is parked or taken away: the driver's checkpoint puts the content of device memory into
private memory of the process, which a capture copies and a page server fills like all other.
"""

from __future__ import annotations

import contextlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shim.gpu.way import Evacuation, Loading, ProcessReport
    from shim.kernel.steps import Steps

NAME = "driver"


class _Nothing:
    """Both sides of a way that leaves everything to the driver."""

    splits = False

    def prepare(self, pids: Sequence[int], until: float) -> None: ...

    def evacuate(self, until: float) -> None: ...

    def checkpointed(self, until: float) -> None: ...

    def finish(self, until: float) -> Mapping[str, object]:
        del until
        return {}

    def end(self) -> None: ...

    def tell(self, steps: Steps) -> None: ...

    def resume(self, until: float) -> None: ...


class _Evacuation(_Nothing):
    def begin(self, gpus: Sequence[str], until: float) -> None: ...

    def give_back(self, until: float) -> None: ...


class _Loading(_Nothing):
    def begin(self, until: float) -> None: ...

    def give_back(self, pids: Sequence[int], until: float) -> None: ...


class DriverWay:
    """See `shim.gpu.way.Way`."""

    name = NAME

    def asked(self, pid: int) -> ProcessReport | None:
        """The driver tells nothing about what a process has called."""
        del pid
        return None

    @contextlib.contextmanager
    def evacuation(self, container: str, payload_dirfd: int, lock: str) -> Iterator[Evacuation]:
        del container, payload_dirfd, lock
        yield _Evacuation()

    @contextlib.contextmanager
    def loading(
        self,
        container: str,
        payload_dirfd: int,
        about: Mapping[str, object],
        pairs: Sequence[tuple[bytes, bytes]],
    ) -> Iterator[Loading]:
        del container, payload_dirfd, about, pairs
        yield _Loading()
