"""Program: asks a server until it answers, then asks at a steady rate. Standard library only.

Runs inside a node, on the node's own Python, alone. The argument is JSON: see `Wanted`. The body of
the request comes from standard input. Writes "up", and at the end a line of JSON:

    first_at_s    when the first answer was there, by CLOCK_MONOTONIC
    first_body    of the first answer
    latencies     [[seconds after the first answer, seconds], …]: of each request from the time at
                  which it was due, so that a server that stands still is not asked less
    errors        requests that got no answer, or another status than 200
"""

import http.client
import json
import sys
import time
from typing import TypedDict

ASK_EVERY_S = 0.003
CONNECT_WITHIN_S = 0.25
ANSWER_WITHIN_S = 60.0
OK = 200


class Wanted(TypedDict):
    """The client's orders. `{n}` in path is the request's number."""

    ip: str
    port: int
    method: str
    path: str
    first_path: str
    interval_s: float
    steady_s: float
    within_s: float


class Client:
    """A client of a server, with a connection that is kept as long as possible."""

    def __init__(self, wanted: Wanted, body: bytes) -> None:
        self.wanted, self.body = wanted, body or None
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, path: str) -> bytes:
        """Make a request. Returns the answer's body. Raises OSError, http.client.HTTPException."""
        if self._connection is None:
            place = (self.wanted["ip"], self.wanted["port"])
            self._connection = http.client.HTTPConnection(*place, timeout=CONNECT_WITHIN_S)
            self._connection.connect()
            self._connection.sock.settimeout(ANSWER_WITHIN_S)
        try:
            self._connection.request(self.wanted["method"], path, self.body)
            answer = self._connection.getresponse()
            body = answer.read()
        except BaseException:
            self.hang_up()
            raise
        if answer.status != OK:
            raise ConnectionError(f"{path}: status {answer.status}")
        return body

    def hang_up(self) -> None:
        """Close the connection, so that the next request makes a connection of its own."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def first(self) -> tuple[float, str]:
        """Returns the time and the body of the first answer. Raises TimeoutError."""
        until = time.monotonic() + self.wanted["within_s"]
        while time.monotonic() < until:
            try:
                body = self.ask(self.wanted["first_path"])
                return time.monotonic(), body.decode()
            except (OSError, http.client.HTTPException):
                self.hang_up()
                time.sleep(ASK_EVERY_S)  # refused at once: nothing listens yet
        raise TimeoutError(f"no answer within {self.wanted['within_s']} s")

    def steadily(self, since: float) -> tuple[list[tuple[float, float]], int]:
        """Returns each latency by the time at which it was due, and the number of failures."""
        latencies, errors = [], 0
        for number in range(1, int(self.wanted["steady_s"] / self.wanted["interval_s"]) + 1):
            due = since + number * self.wanted["interval_s"]
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                self.ask(self.wanted["path"].replace("{n}", str(number)))
                latencies.append((round(due - since, 4), round(time.monotonic() - due, 6)))
            except (OSError, http.client.HTTPException):
                errors += 1
        return latencies, errors


def main() -> None:
    """Ask, and print the findings. Raises TimeoutError when nothing answers."""
    client = Client(json.loads(sys.argv[1]), sys.stdin.buffer.read())
    print("up", flush=True)
    first_at, body = client.first()
    latencies, errors = client.steadily(first_at)
    found = {"first_at_s": first_at, "first_body": body, "latencies": latencies, "errors": errors}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
