"""Runs the bench's client program in a node, and reads its latencies."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.node.enclosure import Enclosure

PORT: Final = 8000
PROGRAM: Final = "/usr/local/lib/bench-client.py"
FIRST_SECOND_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a worker. `{n}` in path is the request's number; first_path: before all."""

    path: str
    interval_s: float
    first_path: str = ""
    method: str = "GET"
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Asked:
    """The client's findings. Times by CLOCK_MONOTONIC, which time.perf_counter() reads as well."""

    first_at_s: float
    first_body: str
    latencies: Sequence[tuple[float, float]]
    errors: int

    def answer(self) -> Any:
        """Returns the first answer's JSON."""
        return json.loads(self.first_body)

    def percentiles(self) -> dict[str, float]:
        """Returns percentiles of all latencies and of the first second. Empty without requests."""
        early = [took for due, took in self.latencies if due <= FIRST_SECOND_S]
        every = [took for _, took in self.latencies]
        found = {}
        for name, values in (("first_second_", early), ("", every)):
            if values:
                found[f"{name}p50_s"] = percentile(values, 50)
                found[f"{name}p99_s"] = percentile(values, 99)
        return found

    def by_second(self) -> list[dict[str, float]]:
        """Returns p50 and p99 of each whole second, as metrics of a first second."""
        found = []
        for second in range(int(max((due for due, _ in self.latencies), default=0))):
            took = [took for due, took in self.latencies if second < due <= second + 1]
            if took:
                found.append(
                    {
                        "first_second_p50_s": percentile(took, 50),
                        "first_second_p99_s": percentile(took, 99),
                    }
                )
        return found


def percentile(values: Sequence[float], rank: float) -> float:
    """Returns a percentile by the nearest rank. Raises IndexError when there are no values."""
    known = sorted(values)
    return known[max(0, math.ceil(rank / 100 * len(known)) - 1)]


@dataclass
class Asking:
    """Runs the client: `with Asking(...) as asking`, start the server, then `asking.found()`."""

    node: Enclosure
    ip: str
    request: Request
    steady_s: float
    within_s: float = 120.0
    port: int = PORT
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        wanted = {
            "ip": self.ip,
            "port": self.port,
            "method": self.request.method,
            "path": self.request.path,
            "first_path": self.request.first_path or self.request.path,
            "interval_s": self.request.interval_s,
            "steady_s": self.steady_s,
            "within_s": self.within_s,
        }
        with tempfile.TemporaryFile() as body:
            body.write(self.request.body)
            body.seek(0)
            # Unbuffered: communicate() reads later output from the pipe itself.
            self._process = self.node.popen(
                ["python3", "-IS", PROGRAM, json.dumps(wanted)],
                stdin=body, stdout=subprocess.PIPE, bufsize=0,
            )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"up\n":
            raise RuntimeError("the client did not start, see above")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def found(self) -> Asked:
        """Wait until the client has ended. Raises TimeoutError when the server did not answer."""
        assert self._process is not None
        out, _ = self._process.communicate(timeout=self.within_s + self.steady_s + 60)
        if self._process.returncode:
            raise TimeoutError(f"{self.ip}:{self.port} has not answered within {self.within_s:g} s")
        said = json.loads(out)
        latencies = [(due, took) for due, took in said["latencies"]]
        return Asked(said["first_at_s"], said["first_body"], latencies, said["errors"])


def install(node: Enclosure) -> None:
    """Put the program into the node."""
    node.write(PROGRAM, (Path(__file__).parent / "client.py").read_text())
