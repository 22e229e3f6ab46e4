"""Measures how long a process stood still: a thread reads the clock every millisecond.

    /pauses?watch=1    start to watch; {"longest_s", "second_s"} since the last question
    /pauses?watch=0    the same, and stop to watch

The clock goes on while a process is frozen, so the gaps are the times that clients had to wait,
however the process was frozen.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .serving import Ask, Json

LOOK_EVERY_S: Final = 0.001


class Pauses:
    """The two longest gaps between two readings of the clock."""

    def __init__(self) -> None:
        self._watch = threading.Event()
        self._gaps = [0.0, 0.0]
        self._started = False

    def answer(self, ask: Ask) -> Json:
        """Answer /pauses."""
        longest, second = self._gaps
        self._gaps = [0.0, 0.0]
        if ask.flag("watch"):
            self._watch.set()
            if not self._started:
                self._started = True
                threading.Thread(target=self._look, name="pauses", daemon=True).start()
        else:
            self._watch.clear()
        return {"longest_s": round(longest, 6), "second_s": round(second, 6)}

    def _look(self) -> None:
        while self._watch.wait():
            last = time.monotonic()
            while self._watch.is_set():
                time.sleep(LOOK_EVERY_S)
                now = time.monotonic()
                self._gaps = sorted((*self._gaps, now - last), reverse=True)[:2]
                last = now
