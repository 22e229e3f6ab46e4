"""The GPUs of a carrier, each with its context and its copy engine's ring. Lean."""

from __future__ import annotations

import contextlib
import threading

from shim.gpu.direct.device import Driver, DriverError, Gpu, processors
from shim.gpu.direct.mover import Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Gpus:
    """Holds contexts by UUID, each with its ring. The first use of a GPU makes its context."""

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._rings: dict[bytes, Ring] = {}
        self._lock = threading.Lock()

    def warm(self, uuids: Sequence[bytes]) -> None:
        """Make contexts, in a thread. A device on which that fails may never be used."""

        def work() -> None:
            for uuid in uuids:
                with contextlib.suppress(OSError, LookupError, DriverError):
                    self.ring(uuid, of=len(uuids))

        threading.Thread(target=work, daemon=True).start()

    def ring(self, uuid: bytes, *, of: int = 1) -> Ring:
        """Returns the ring of a GPU. of: how many GPUs share the processors."""
        with self._lock:
            if uuid not in self._rings:
                self._driver = self._driver or Driver()
                gpu = Gpu(self._driver, uuid)
                gpu.use()
                self._rings[uuid] = Ring(gpu, max(2, processors() // of))
        self._rings[uuid].gpu.use()
        return self._rings[uuid]

    def gpu(self, uuid: bytes) -> Gpu:
        """Returns the GPU. Afterwards its context is the thread's."""
        return self.ring(uuid).gpu
