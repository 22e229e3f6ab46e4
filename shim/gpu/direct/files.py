"""The files of a payload with device memory: several for each GPU. Lean."""

from __future__ import annotations

import contextlib
import os

from shim.gpu.direct import mover
from shim.kernel.beneath import open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def opened(dirfd: int, gpu: int, flags: int) -> Iterator[list[int]]:
    """Gives the files of a GPU. gpu: its place in `about`. Raises OSError."""
    mode = 0o600 if flags & os.O_CREAT else 0
    with contextlib.ExitStack() as held:
        yield [
            held.enter_context(open_beneath(dirfd, mover.name(gpu, file), flags, mode)).fileno()
            for file in range(mover.FILES)
        ]
