"""Program: behaves towards `driver.Fake` as a CUDA process towards the driver. No GPU needed.

    python3 -m tests.gpu.fake_worker HOME MIB

The payload moves to private anonymous memory of its own when it is checkpointed, and back.
"""

import hashlib
import mmap
import random
import sys
from pathlib import Path
from typing import Any

from tests.gpu import control

MIB = 1 << 20


class Payload:
    """The memory that stands for the device's."""

    def __init__(self, home: Path, mib: int) -> None:
        self.home, self.size = home, mib * MIB
        # Content to recognise, not a secret.
        self.device: bytes | None = random.Random(mib).randbytes(MIB) * mib  # noqa: S311
        self.staging: list[mmap.mmap] = []
        self.expected = self.digest()
        self.state = "running"
        self.tell()

    def digest(self) -> str:
        return hashlib.sha256(self.device or b"").hexdigest()

    def tell(self) -> None:
        (self.home / "state.new").write_text(self.state)
        (self.home / "state.new").rename(self.home / "state")

    def obey(self) -> None:
        """Obey the request of the driver, if there is one."""
        try:
            wanted = (self.home / "driver").read_text()
        except FileNotFoundError:
            return
        (self.home / "driver").unlink()
        if wanted == "checkpointed":
            self.stage()
        elif self.state == "checkpointed":
            self.unstage()
        self.state = wanted
        self.tell()

    def stage(self) -> None:
        half = self.size // 2
        for start in (0, half):
            area = mmap.mmap(-1, half, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            area[:] = (self.device or b"")[start : start + half]
            self.staging.append(area)
        self.device = None

    def unstage(self) -> None:
        self.device = b"".join(area[:] for area in self.staging)
        for area in self.staging:
            area.close()
        self.staging.clear()

    def ask(self, verb: str, argument: str) -> dict[str, Any]:
        """`check` verifies the payload; anything else is agreed to."""
        del argument
        return {"ok": verb != "check" or self.digest() == self.expected}


def main() -> None:
    """Ready at once."""
    home = Path(sys.argv[1])
    payload = Payload(home, int(sys.argv[2]))
    control.reply(home, 0, {"ready": True})
    control.serve(home, payload.ask, payload.obey)


if __name__ == "__main__":
    main()
