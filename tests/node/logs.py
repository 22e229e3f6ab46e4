"""Container logs, as CRI runtimes write them and kubelet reads them.

A line is `TIME STREAM TAG TEXT`, where tag P says that the text goes on in the next line of the
stream, and F that it ends.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogLine:
    """A whole line that a container wrote, without its end. `time` is RFC 3339 with ns."""

    time: str
    stream: str
    text: str


def parse(content: str) -> list[LogLine]:
    """Returns all whole lines of a log file. Raises ValueError when a line is not CRI's."""
    lines: list[LogLine] = []
    begun: dict[str, str] = {}
    for raw in content.split("\n")[:-1]:  # only a line feed ends a line
        time, stream, tag, *text = raw.split(" ", 3)
        begun[stream] = begun.get(stream, "") + "".join(text)
        if tag == "F":
            lines.append(LogLine(time, stream, begun.pop(stream)))
        elif tag != "P":
            raise ValueError(f"not a line of a CRI log: {raw!r}")
    return lines
