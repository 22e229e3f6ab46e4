"""Asks an inference worker from within its node, as soon as the worker can answer."""

import http.client
import json
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from tests.node import kernel
from tests.node.kubelet import Container, Pod
from tests.workers.inputs import Input

PORT: Final = 8000
ASK_EVERY_S: Final = 0.003
CONNECT_WITHIN_S: Final = 0.25
ANSWER_WITHIN_S: Final = 60.0

Answers = dict[str, dict[str, Any]]
"""The whole JSON of each answer, by the input's name."""


@dataclass(frozen=True, slots=True)
class Started:
    """The times of a container's start, in seconds from the call of StartContainer.

    first_answer_s: to the end of the first answer of POST /predict. returned_s: to the return of
    StartContainer.
    """

    first_answer_s: float
    returned_s: float


def start(container: Container, document: bytes) -> Started:
    """Call StartContainer, and send `document` over and over until the worker answers.

    Raises TimeoutError, and the exceptions of StartContainer.
    """
    with ThreadPoolExecutor(1, "asking") as thread:
        answered = thread.submit(_ask_until_answered, container.pod, document)
        called_s = container.start()
        return Started(answered.result() - called_s, container.start_took_s)


def _ask_until_answered(pod: Pod, document: bytes) -> float:
    """Returns the answer's time, by time.perf_counter(). Its thread joins the node's network."""
    init_fd = os.pidfd_open(pod.node.pid)
    try:
        kernel.setns(init_fd, kernel.CLONE_NEWNET)
    finally:
        os.close(init_fd)
    deadline = time.monotonic() + ANSWER_WITHIN_S
    while time.monotonic() < deadline:
        try:
            _predict(pod.ip, document)
            return time.perf_counter()
        except (OSError, http.client.HTTPException):
            time.sleep(ASK_EVERY_S)  # refused at once: nothing listens yet
    raise TimeoutError(f"{pod.spec.name} has not answered: {pod.container().logs()[-2000:]}")


def _predict(ip: str, document: bytes) -> None:
    client = http.client.HTTPConnection(ip, PORT)
    client.sock = socket.create_connection((ip, PORT), CONNECT_WITHIN_S)
    try:
        client.sock.settimeout(ANSWER_WITHIN_S)
        client.request("POST", "/predict", document)
        answer = client.getresponse()
        if answer.status != http.client.OK:
            raise ConnectionError(f"/predict: status {answer.status}")
        answer.read()
    finally:
        client.close()


def answers(pod: Pod, inputs: Sequence[Input]) -> Answers:
    """Send every input. Returns the answers. Raises OSError."""
    return {
        each.name: json.loads(pod.node.http("POST", pod.ip, PORT, "/predict", each.document).body)
        for each in inputs
    }


def state(pod: Pod) -> dict[str, Any]:
    """Returns GET /state: nonce, pid, hostname, uptime_s, `kept` and more."""
    said: dict[str, Any] = pod.node.http("GET", pod.ip, PORT, "/state").json()
    return said
