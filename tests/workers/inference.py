"""An inference server: tells the type of a document, and reads the text of a picture.

    PORT=8000 python3 -m workers.inference

Four models on onnxruntime, from the wheels that ship them: magika's content types, and rapidocr's
text detection, orientation and recognition. The server listens once the models are loaded and
warmed up over the shapes of its later requests, as servers do whose first request must be fast.

    GET  /health    200; before the warm-up is over nothing listens
    POST /predict   the document in, {"label", "group", "score", "text", "scores", "sha256"} out;
                    the same bytes give the same answer
    GET  /state     nonce, pid, hostname, uptime_s, requests, `kept` (every file and shared memory
                    that is held, verified), statistics, restored

The server has the parts of real servers: thread pools of onnxruntime, OpenBLAS and OpenCV, a thread
that keeps statistics, a journal of results in its rootfs that stays open, an unlinked temporary
file, and a table of recent results in shared memory (/dev/shm). A numbered log line per request.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Final

# onnxruntime reports its use to its maker, which a test must not; the variable is read at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import uvicorn
from magika import Magika
from rapidocr import RapidOCR
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route

from . import inputs
from .serving import Identity, Json, LineLog, port_from_environment, restored, stop_on_sigterm

if TYPE_CHECKING:
    from starlette.requests import Request

JOURNAL: Final = "/var/cache/inference/results.jsonl"
TABLE_SIZE: Final = 1 << 20
PICTURES: Final = frozenset({"png", "jpeg", "bmp", "webp", "tiff"})
# Size for text detection: our documents are cards and labels, not pages.
LONG_SIDE: Final = 480


class Models:
    """The models, loaded and warm."""

    def __init__(self, log: LineLog) -> None:
        started = time.monotonic()
        self._one_at_a_time = threading.Lock()
        self._magika = Magika()
        self._ocr = RapidOCR(
            params={
                "Global.log_level": "error",
                "Det.limit_type": "max",
                "Det.limit_side_len": LONG_SIDE,
                "EngineConfig.onnxruntime.intra_op_num_threads": max(2, os.cpu_count() or 2),
            }
        )
        log.say(f"models loaded after {time.monotonic() - started:.2f} s")
        self._warm_up()
        log.say(f"models warm after {time.monotonic() - started:.2f} s")

    def _warm_up(self) -> None:
        """Allocate the arenas of every shape here, and not in a request."""
        for width in (160, 320, 480, 640):
            for lines in (1, 2, 4, 6):
                text = [f"Warm-up line {number} of {lines}" for number in range(lines)]
                self.predict(inputs.picture(text, width=width))

    def predict(self, document: bytes) -> Json:
        """Returns the content type, and the text lines of a picture from top to bottom."""
        with self._one_at_a_time:
            kind = self._magika.identify_bytes(document)
            answer: Json = {
                "label": str(kind.output.label),
                "group": kind.output.group,
                "score": round(kind.score, 3),
                "sha256": hashlib.sha256(document).hexdigest(),
                "text": [],
                "scores": [],
            }
            if answer["label"] in PICTURES:
                read = self._ocr(document)
                answer["text"] = list(read.txts or ())
                answer["scores"] = [round(float(score), 2) for score in read.scores or ()]
        return answer


class Kept:
    """The server's files and shared memory outside of its own memory, which it can verify."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        os.makedirs(os.path.dirname(JOURNAL), exist_ok=True)
        self._journal = open(JOURNAL, "w+b", buffering=0)  # noqa: SIM115  kept for life
        self._spool = tempfile.TemporaryFile(prefix="inference-", buffering=0)  # noqa: SIM115
        self._table = shared_memory.SharedMemory(create=True, size=TABLE_SIZE)
        self._rows = memoryview(self._table.buf or b"")
        self._written, self._slot = hashlib.sha256(), 0
        self._spooled = os.urandom(1 << 16)
        self._spool.write(self._spooled)
        self._slots: dict[int, bytes] = {}

    def add(self, answer: Json) -> None:
        """Append to the journal and put into the next slot of the table."""
        line = json.dumps(answer).encode() + b"\n"
        slot_size = 4096
        row = line[:slot_size].ljust(slot_size, b"\0")
        with self._lock:
            self._journal.write(line)
            self._written.update(line)
            start = self._slot * slot_size
            self._rows[start : start + slot_size] = row
            self._slots[start] = row
            self._slot = (self._slot + 1) % (TABLE_SIZE // slot_size)

    def close(self) -> None:
        """Release the shared memory and its name, which outlive the process."""
        self._rows.release()
        self._table.close()
        self._table.unlink()

    def verify(self) -> dict[str, bool]:
        """Returns for each object whether it has the written content, by descriptor and by name."""
        with self._lock:
            size = os.fstat(self._journal.fileno()).st_size
            held = os.pread(self._journal.fileno(), size, 0)
            with open(JOURNAL, "rb") as file:
                named = file.read()
            rows = self._slots.items()
            return {
                "journal": hashlib.sha256(held).digest() == self._written.digest(),
                "journal_by_name": named == held,
                "deleted_file": os.pread(self._spool.fileno(), 1 << 17, 0) == self._spooled,
                "shared_memory": all(self._rows[at : at + len(row)] == row for at, row in rows),
                "shared_memory_by_name": os.path.exists(f"/dev/shm/{self._table.name}"),
            }


@dataclass
class Statistics:
    """Statistics, which a thread of their own updates once a second."""

    ticks: int = 0
    predictions: int = 0
    busy_s: float = 0.0
    max_rss_mib: int = 0
    rates: list[int] = field(default_factory=list)

    def keep(self) -> None:
        """Update the statistics for ever. Body of the thread."""
        before = self.predictions
        while True:
            time.sleep(1)
            self.ticks += 1
            self.rates = [*self.rates[-59:], self.predictions - before]
            before = self.predictions
            self.max_rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Service:
    """The endpoints."""

    def __init__(self) -> None:
        self.me, self.log = Identity("inference"), LineLog()
        # Until uvicorn takes over, and again when uvicorn is done and hands the signal on.
        stop_on_sigterm(self.log)
        self.log.say(f"start {self.me.nonce}")
        self.models, self.kept, self.statistics = Models(self.log), Kept(), Statistics()
        threading.Thread(target=self.statistics.keep, name="statistics", daemon=True).start()

    async def health(self, _: Request) -> JSONResponse:
        """Answer 200: the server is warm from the first moment that it listens."""
        return JSONResponse({"ok": True})

    async def state(self, _: Request) -> JSONResponse:
        """Returns the proof of identity, and a check of everything that is held."""
        kept = await run_in_threadpool(self.kept.verify)
        facts = {"statistics": vars(self.statistics), "restored": restored()}
        return JSONResponse(self.me.describe() | {"kept": kept} | facts)

    async def predict(self, request: Request) -> JSONResponse:
        """Answer for a document."""
        document = await request.body()
        return JSONResponse(await run_in_threadpool(self._predict, document))

    def _predict(self, document: bytes) -> Json:
        number, started = self.me.count_request(), time.monotonic()
        answer = self.models.predict(document)
        took_s = time.monotonic() - started
        self.kept.add(answer)
        self.statistics.predictions += 1
        self.statistics.busy_s += took_s
        self.log.say(f"request {number} {answer['label']} {len(document)} B {took_s * 1000:.0f} ms")
        return answer

    def run(self) -> None:
        """Serve until SIGTERM, which lets requests finish."""
        app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/state", self.state),
                Route("/predict", self.predict, methods=["POST"]),
            ]
        )
        port = port_from_environment()
        self.log.say(f"ready on port {port}")
        try:
            uvicorn.run(app, host="0.0.0.0", port=port, log_config=None, access_log=False)  # noqa: S104
        finally:
            self.kept.close()


if __name__ == "__main__":
    Service().run()
