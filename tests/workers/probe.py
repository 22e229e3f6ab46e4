"""A tiny process that does, and reports, whatever an end-to-end test asks over HTTP.

    PORT=8000 python3 -m workers.probe

Environment: PORT (8000), LISTEN (`0.0.0.0` by default; a comma-separated list of HOST or HOST@PORT,
where `pod` is the pod's own address), WARM=0 (health is 503 until /ready), TERM_DELAY_S and
TERM_CODE (for the SIGTERM handler), TICK_MS (log lines from the start). Every request is a log line
`NNNNNNNN request N METHOD PATH STATUS`; every line has a number. Lines from stdin are logged as
`stdin TEXT`. GET and POST are the same.

Identity and confinement
    /health                        200, or 503 before the probe is warm
    /state                         nonce, pid, hostname, uptime_s, requests, counter, lines, ...
    /count                         adds 1 to a counter in memory
    /who                           credentials, capabilities, seccomp, limits, namespaces, cgroup
    /net                           hostname, addresses, routes, listeners, resolv.conf, hosts
    /env                           the environment and arguments at the start of the process
    /mounts                        destination, type and options of every mount
    /restored                      the content of restored.json, or null
    /ready                         warm from now on, and says so in the control directory
    /called                        the calls of /quiesce and /resume, in order
    /quiesce, /resume              count; with /prepare?quiesce=500 they answer that status
Sockets
    /listen?host=H&port=P          another listening address (`pod`, `::`, `0.0.0.0`, ...)
    /peer                          the two ends of this very connection
    /fetch?host=H&port=P&path=/X   a request of our own to somewhere else
Files (all: ?path=P; an OSError answers 409 with its errno)
    /write?size=N&seed=S&offset=O  content that follows from the seed, or the request's body
    /read                          kind, size, mode, uid, gid, mtime_ns, nlink, blocks, sha256, text
    /tree                          the same of everything below, by name
    /delete, /mkdir, /opaque       opaque: the directory is removed and made again, empty
    /link?to=T, /symlink?to=T      hard and symbolic
    /chmod?mode=0o640, /mtime?ns=N, /fifo
    /xattr?name=N&value=V          sets an extended attribute
    /hold?name=N&size=S&seed=S     opens, writes and keeps a file; delete=1 unlinks the file; map=1
                                   maps it shared and closes the descriptor
    /held                          every held file verified: {name: {"ok", "deleted", "size"}}
    /append?name=N&text=T          writes to a held file
Output, threads, memory, end
    /log?count=N&size=S&stream=stderr&text=T   numbered lines, at once
    /tick?ms=N                     a line every N ms, 0 stops; /state shows `ticks`
    /spin?count=N                  N threads that count; /threads shows their counters
    /allocate?mib=N                N MiB more, touched; with mib=0 until the OOM killer comes
    /exit?code=N                   ends the process; /signal?number=N has it signal itself
    /term?delay_s=S&code=N         changes the handling of SIGTERM
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from . import facts, files
from .serving import READY, Ask, Identity, Json, LineLog, Reply, Server, port_from_environment
from .serving import restored as restored_facts

if TYPE_CHECKING:
    from .serving import Routes


class Probe:
    """The state that survives a capture, and the endpoints that show and change the state."""

    def __init__(self) -> None:
        self.me, self.log, self.files = Identity("probe"), LineLog(), files.Files()
        self.warm = os.environ.get("WARM", "1") == "1"
        self.counter = self.ticks = 0
        self.tick_ms = int(os.environ.get("TICK_MS", "0"))
        self.called: list[str] = []
        self.prepared: dict[str, int] = {}
        self.spinning: list[int] = []
        self.hoard: list[bytearray] = []
        self.listening: list[str] = []
        self.term_delay_s = float(os.environ.get("TERM_DELAY_S", "0"))
        self.term_code = int(os.environ.get("TERM_CODE", "0"))
        self.ending = threading.Event()

    # Identity and confinement

    def health(self, _: Ask) -> Reply:
        """Answer 200 when warm, 503 before."""
        return Reply(200 if self.warm else 503, {"ok": self.warm})

    def state(self, _: Ask) -> Json:
        """Returns everything that lives in memory only."""
        return {
            **self.me.describe(),
            "counter": self.counter,
            "ticks": self.ticks,
            "lines": self.log.lines,
            "listening": self.listening,
            "called": self.called,
            "allocated_mib": sum(map(len, self.hoard)) >> 20,
        }

    def count(self, _: Ask) -> Json:
        """Add 1 to the counter."""
        self.counter += 1
        return {"counter": self.counter}

    def ready(self, _: Ask) -> Json:
        """Become warm; if the control directory is mounted, say so there."""
        self.warm = True
        if told := os.path.isdir(os.path.dirname(READY)):
            with open(READY, "w", encoding="ascii") as file:
                file.write("ready\n")
        return {"ok": True, "told": told}

    def prepare(self, ask: Ask) -> Json:
        """Set the status that /quiesce and /resume answer from now on."""
        self.prepared = {name: int(status) for name, status in ask.query.items()}
        return {"prepared": self.prepared}

    def call(self, name: str) -> Reply:
        """Record a call of quiesce or resume."""
        self.called.append(name)
        return Reply(self.prepared.get(name, 200), {"called": self.called})

    # Sockets

    def listen(self, ask: Ask) -> Json:
        """Open another address with the same endpoints."""
        return {"address": self.listen_on(ask.text("host"), ask.whole("port"))}

    def listen_on(self, host: str, port: int) -> str:
        """Listen on `host`, where `pod` is the pod's own address. Raises OSError."""
        address = facts.own_address() if host == "pod" else host
        Server(address, port, self.routes(), self.log, self.me).start()
        self.listening.append(f"{address}@{port}")
        return address

    @staticmethod
    def peer(ask: Ask) -> Json:
        """Returns both ends of the asking connection."""
        return {"local": ask.local, "peer": ask.peer}

    @staticmethod
    def fetch(ask: Ask) -> Json:
        """Make a request: shows that outgoing connections work, and their source address."""
        there = http.client.HTTPConnection(ask.text("host"), ask.whole("port"), timeout=5)
        try:
            there.request("GET", ask.text("path", "/peer"))
            answered = there.getresponse()
            return {"status": answered.status, "body": answered.read().decode(errors="replace")}
        finally:
            there.close()

    # Output, threads, memory, end

    def log_lines(self, ask: Ask) -> Json:
        """Print lines. Returns the numbers of the first and the last."""
        fd = 2 if ask.text("stream", "stdout") == "stderr" else 1
        text = ask.text("text", "line").ljust(ask.whole("size", 0), ".")
        numbers = [self.log.say(text, fd) for _ in range(ask.whole("count", 1))]
        return {"first": numbers[0], "last": numbers[-1]} if numbers else {}

    def tick(self, ask: Ask) -> Json:
        """Set the pace of the ticking thread."""
        self.tick_ms = ask.whole("ms")
        return {"ticks": self.ticks}

    def keep_ticking(self) -> None:
        """Print a line per interval, for ever. Body of a thread."""
        while True:
            if self.tick_ms:
                self.ticks += 1
                self.log.say(f"tick {self.ticks}")
            time.sleep(self.tick_ms / 1000 or 0.05)

    def spin(self, ask: Ask) -> Json:
        """Start threads that count, gently."""
        for _ in range(ask.whole("count")):
            self.spinning.append(0)
            index = len(self.spinning) - 1
            threading.Thread(target=self._count_for_ever, args=(index,), daemon=True).start()
        return {"threads": self.spinning}

    def _count_for_ever(self, index: int) -> None:
        while True:
            self.spinning[index] += 1
            time.sleep(0.01)

    def allocate(self, ask: Ask) -> Json:
        """Take memory and write to it; without end when `mib` is 0."""
        wanted = ask.whole("mib")
        taken = 0
        while taken < wanted or wanted == 0:
            self.hoard.append(bytearray(os.urandom(4096) * 256))
            taken += 1
        return {"allocated_mib": sum(map(len, self.hoard)) >> 20}

    @staticmethod
    def exit(ask: Ask) -> Json:
        """End at once, without an answer."""
        os._exit(ask.whole("code", 0))

    @staticmethod
    def signal_self(ask: Ask) -> Json:
        """Signal this process. Pid 1 of a container ignores signals that it does not handle."""
        os.kill(os.getpid(), ask.whole("number"))
        return {"ok": True}

    def term(self, ask: Ask) -> Json:
        """Change the handling of SIGTERM."""
        self.term_delay_s, self.term_code = ask.number("delay_s", 0), ask.whole("code", 0)
        return {"delay_s": self.term_delay_s, "code": self.term_code}

    def on_sigterm(self, *_: object) -> None:
        """Log, wait as configured, log, exit. The handler of SIGTERM."""
        self.log.say("signal SIGTERM")
        time.sleep(self.term_delay_s)
        self.log.say(f"exit {self.term_code}")
        os._exit(self.term_code)

    def echo_stdin(self) -> None:
        """Log every line of stdin until its end. Body of a thread; `attach` sees both ways."""
        for line in sys.stdin:
            self.log.say(f"stdin {line.rstrip()}")

    def routes(self) -> Routes:
        """Returns every endpoint by its path."""
        return {
            "/health": self.health,
            "/state": self.state,
            "/count": self.count,
            "/who": lambda _: facts.who(),
            "/net": lambda _: facts.network(),
            "/env": lambda _: facts.environment(),
            "/mounts": lambda _: facts.mounts(),
            "/restored": lambda _: restored_facts(),
            "/ready": self.ready,
            "/called": lambda _: self.called,
            "/prepare": self.prepare,
            "/quiesce": lambda _: self.call("quiesce"),
            "/resume": lambda _: self.call("resume"),
            "/listen": self.listen,
            "/peer": self.peer,
            "/fetch": self.fetch,
            "/log": self.log_lines,
            "/tick": self.tick,
            "/spin": self.spin,
            "/threads": lambda _: {"threads": self.spinning},
            "/allocate": self.allocate,
            "/exit": self.exit,
            "/signal": self.signal_self,
            "/term": self.term,
            **self.files.routes(),
        }

    def run(self) -> None:
        """Listen on the addresses of LISTEN, and stay."""
        signal.signal(signal.SIGTERM, self.on_sigterm)
        port = port_from_environment()
        for place in os.environ.get("LISTEN", "0.0.0.0").split(","):  # noqa: S104
            host, _, its_port = place.partition("@")
            self.listen_on(host, int(its_port or port))
        for body in (self.keep_ticking, self.echo_stdin):
            threading.Thread(target=body, daemon=True).start()
        self.log.say(f"ready {socket.gethostname()} {' '.join(self.listening)}")
        self.ending.wait()


if __name__ == "__main__":
    Probe().run()
