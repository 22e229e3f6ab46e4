"""CRIU from the bundle: dump and restore of one process tree, with what each cost and said."""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.gpu import children

MIB: Final = 1 << 20
PLAIN: Final = ("--shell-job", "-v4")
_STATS: Final = {
    1: ("freezing_us", "frozen_us", "memdump_us", "memwrite_us", "pages_scanned", "", "pages"),
    2: ("pages_compared", "", "forking_us", "restore_us", "pages"),
}


@dataclass(frozen=True, slots=True)
class Criu:
    """`bundle`: what `make gpu-bundle` made."""

    bundle: Path

    @property
    def program(self) -> str:
        return str(self.bundle / "bin" / "criu")

    def check(self) -> dict[str, Any]:
        """`criu check`, plain and of everything."""
        found: dict[str, Any] = {}
        for words in (["--version"], ["check"], ["check", "--all"]):
            done = children.run([self.program, *words], 60)
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            found[" ".join(words)] = {"rc": done.returncode, "said": said[-20:]}
        return found

    def dump(self, pid: int, images: Path, *options: str, timeout_s: float = 120) -> dict[str, Any]:
        """Kills the process unless told otherwise. `ok` says whether it worked."""
        images.mkdir(parents=True, exist_ok=True)
        words = ["dump", "-t", str(pid), "-D", str(images), "-o", "dump.log", *PLAIN, *options]
        return self._run(words, images, "dump", timeout_s) | {"images": sizes(images)}

    def restore(self, images: Path, *options: str, timeout_s: float = 120) -> dict[str, Any]:
        """Detached; `pid` is the restored process."""
        pid_file = images / "restored.pid"
        pid_file.unlink(missing_ok=True)
        words = ["restore", "-D", str(images), "-o", "restore.log", *PLAIN, *options]
        words += ["--restore-detached", "--pidfile", str(pid_file)]
        done = self._run(words, images, "restore", timeout_s)
        with contextlib.suppress(OSError, ValueError):
            done["pid"] = int(pid_file.read_text())
        return done

    def _run(self, words: list[str], images: Path, what: str, timeout_s: float) -> dict[str, Any]:
        started = time.monotonic()
        done = children.run([self.program, *words], timeout_s)
        finding: dict[str, Any] = {
            "ok": done.returncode == 0,
            "rc": done.returncode,
            "s": round(time.monotonic() - started, 3),
            "options": " ".join(words[7:]),
        }
        if done.returncode:
            finding["errors"] = errors(images / f"{what}.log") or done.stderr[-400:]
        with contextlib.suppress(OSError):
            finding["stats"] = stats(images / f"stats-{what}")
        return finding


def errors(log: Path) -> list[str]:
    """Error lines of a CRIU log, and before the first of them what it was about."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    wrong = [index for index, line in enumerate(lines) if "Error (" in line]
    before = lines[max(0, wrong[0] - 6) : wrong[0]] if wrong else lines[-6:]
    return before + [lines[index] for index in wrong[:12]]


def sizes(images: Path) -> dict[str, Any]:
    """Together, and the largest files."""
    known = {path.name: path.stat().st_size for path in images.iterdir() if path.is_file()}
    largest = sorted(known.items(), key=lambda item: -item[1])[:5]
    shown = {name: size for name, size in largest if not re.search(r"\.log$", name)}
    return {"files": len(known), "bytes": sum(known.values()), "largest": shown}


def stats(path: Path) -> dict[str, int]:
    """stats-dump or stats-restore: varint fields of the message inside StatsEntry."""
    data = path.read_bytes()[8:]  # two magic numbers
    data = data[4:]  # the message's size
    which, data = data[0] >> 3, data[1:]
    _, data = varint(data)
    names, found = _STATS[which], {}
    while data:
        tag, data = varint(data)
        value, data = varint(data)
        index = (tag >> 3) - 1
        if index < len(names) and names[index]:
            found[names[index]] = value
    return found


def varint(data: bytes) -> tuple[int, bytes]:
    """A number of protobuf's encoding and what follows it."""
    value = 0
    for index, octet in enumerate(data):
        value |= (octet & 0x7F) << 7 * index
        if octet < 0x80:
            return value, data[index + 1 :]
    raise ValueError("a number does not end")


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A directory for images that is removed at the end."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
