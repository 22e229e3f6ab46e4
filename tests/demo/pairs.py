"""Program: run two commands by turns, many times, and print how long each took.

Runs inside a node, on the node's own Python, alone: standard library only. Arguments: how many
pairs, and the two commands as JSON lists. Prints two JSON lists of milliseconds.
"""

import json
import os
import sys
import time

WARM_UP = 10


def main() -> None:
    """Raises SystemExit when a command fails: its time would mean nothing."""
    pairs, commands = int(sys.argv[1]), [json.loads(text) for text in sys.argv[2:4]]
    took_ms: list[list[float]] = [[], []]
    for number in range(WARM_UP + pairs):
        # Who goes first changes, so that neither always finds what the other has warmed up.
        for which in (0, 1) if number % 2 else (1, 0):
            ms = once(commands[which])
            if number >= WARM_UP:
                took_ms[which].append(ms)
    print(json.dumps(took_ms))


def once(command: list[str]) -> float:
    """Milliseconds from before the spawn to after the wait."""
    null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    began = time.perf_counter_ns()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=null)
    status = os.waitpid(pid, 0)[1]
    ended = time.perf_counter_ns()
    if status:
        sys.exit(f"{command} ended with wait status {status}")
    return (ended - began) / 1e6


if __name__ == "__main__":
    main()
