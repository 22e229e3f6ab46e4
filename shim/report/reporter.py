"""The one place that is told of records, and hands each to every sink."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shim.report import events, journal
from shim.report.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.kube.sender import Sender
    from shim.report.records import Happened

    Sink = Callable[[Happened], None]


class Reporter:
    """metrics: the counters, which others may show. May be told from any thread."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._sinks: list[Sink] = [self.metrics.tell, journal.tell]

    def tell(self, record: Happened) -> None:
        """Hand the record to every sink."""
        for sink in self._sinks:
            sink(record)

    @contextlib.contextmanager
    def telling_kubernetes(self, kubeconfig: str) -> Iterator[None]:
        """Make events of records inside of the `with`; none where no kubeconfig is named."""
        if not kubeconfig:
            yield
            return
        from shim.kube.sender import Sender  # here: most nodes have no use for it

        sender = Sender(kubeconfig, self.metrics.event, node=os.uname().nodename)
        sender.start()
        try:
            with self.also(lambda record: _send(sender, record)):
                yield
        finally:
            sender.stop()

    @contextlib.contextmanager
    def also(self, sink: Sink) -> Iterator[None]:
        """Hand records to one more sink inside of the `with`."""
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)


def _send(sender: Sender, record: Happened) -> None:
    if event := events.of(record):
        sender.send(event)
