"""Program: runs two commands by turns, many times, and prints the time of each.

Runs inside a node, on the node's own Python, alone: standard library only. Arguments: the number of
pairs, and the two commands as JSON lists. Prints two JSON lists of milliseconds.
"""

import json
import os
import sys
import time

WARM_UP = 10


def main() -> None:
    """Run the pairs. Raises SystemExit when a command fails: its time would mean nothing."""
    pairs, commands = int(sys.argv[1]), [json.loads(text) for text in sys.argv[2:4]]
    took_ms: list[list[float]] = [[], []]
    for number in range(WARM_UP + pairs):
        # The order alternates, so that neither command always profits from the other's warm caches.
        for which in (0, 1) if number % 2 else (1, 0):
            ms = once(commands[which])
            if number >= WARM_UP:
                took_ms[which].append(ms)
    print(json.dumps(took_ms))


def once(command: list[str]) -> float:
    """Returns the milliseconds from before the spawn to after the wait."""
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
