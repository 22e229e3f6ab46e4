"""Parses runc's command line, and never rewrites it.

When a call is not clear, `parse` returns None, and the caller hands everything to the real runtime.
Source: runc(8), runc-create(8), runc-start(8).
"""

from __future__ import annotations

_GLOBAL_VALUES = {"--log", "--log-format", "--root", "--criu", "--rootless"}
_GLOBAL_SWITCHES = {"--debug", "--systemd-cgroup"}
_VALUES = {
    "create": {"--bundle", "-b", "--console-socket", "--pidfd-socket", "--pid-file",
               "--preserve-fds"},
    "start": set[str](),
}  # fmt: skip
_SWITCHES = {"create": {"--no-pivot", "--no-new-keyring"}, "start": set[str]()}


class Call:
    """A call of `create` or `start`.

    command: its name. container: the id as given. root_flags: the global flags that tell the place
    of the runtime's state and the kind of cgroups, to be repeated in our own calls. options: the
    command's flags; a switch has the value "".
    """

    __slots__ = ("command", "container", "options", "root_flags")

    def __init__(
        self, command: str, container: str, root_flags: list[str], options: dict[str, str]
    ) -> None:
        self.command, self.container = command, container
        self.root_flags, self.options = root_flags, options

    def option(self, *names: str) -> str:
        """Returns the value of the first of `names` that was given, or the empty string."""
        return next((self.options[name] for name in names if name in self.options), "")


def parse(arguments: list[str]) -> Call | None:
    """Returns the call in `arguments` (without the program's name), or None when unsure."""
    flags, rest = _take(arguments, _GLOBAL_VALUES, _GLOBAL_SWITCHES)
    if not rest or (command := rest[0]) not in _VALUES:
        return None
    options, operands = _take(rest[1:], _VALUES[command], _SWITCHES[command])
    if len(operands) != 1 or operands[0].startswith("-"):
        return None
    kept = [flag for name in ("--root", "--systemd-cgroup", "--rootless")
            for flag in _again(name, flags)]  # fmt: skip
    return Call(command, operands[0], kept, options)


def _take(
    arguments: list[str], values: set[str], switches: set[str]
) -> tuple[dict[str, str], list[str]]:
    """Split flags from the arguments behind them. An unknown flag begins the rest."""
    taken: dict[str, str] = {}
    position = 0
    while position < len(arguments) and arguments[position].startswith("-"):
        name, equals, value = arguments[position].partition("=")
        name = f"--{name.lstrip('-')}" if len(name.lstrip("-")) > 1 else name
        if name in switches or (name in values and equals):
            taken[name] = value
        elif name in values and position + 1 < len(arguments):
            position += 1
            taken[name] = arguments[position]
        else:
            break
        position += 1
    return taken, arguments[position:]


def _again(name: str, flags: dict[str, str]) -> list[str]:
    if name not in flags:
        return []
    return [f"{name}={flags[name]}"] if flags[name] else [name]
