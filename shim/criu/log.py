"""Finds the cause of a failure in CRIU's and runc's logs."""

from __future__ import annotations

from shim.contract import jsontext

_MAX_BYTES = 4 << 20
_CRIU_ERROR = r"^\([\d.]+\)\s+(?:\d+: )?Error \([^)]*\): (.*)$"
_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE",)
"""CRIU goes on after these errors. The first comes wherever CAP_SYS_RESOURCE is missing."""


def first_error(directory: str, name: str) -> str:
    """Returns the first Error line of CRIU's log `name` in `directory`, else runc's last message.

    The first line, because later errors are consequences of the first. Never raises: for a missing
    log, the text says so.
    """
    import re  # late: needed only after a failure

    errors = re.compile(_CRIU_ERROR, re.MULTILINE)
    for criu in errors.finditer(_tail(f"{directory}/{name}")):
        if not criu[1].startswith(_HARMLESS):
            return f"criu: {criu[1].strip()}"
    messages = []
    for line in _tail(f"{directory}/runc.log").splitlines():
        try:
            # On a single line, as a journal needs.
            messages.append(" ".join(str(jsontext.parse(line)["msg"]).split()))
        except (ValueError, KeyError, TypeError):
            continue
    if messages:
        return f"runc: {messages[-1]}"
    return f"neither CRIU nor runc wrote why in {directory}"


def _tail(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(_MAX_BYTES)
    except OSError:
        return ""
