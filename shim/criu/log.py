"""Finds the cause of a failure in CRIU's and runc's logs."""

from __future__ import annotations

import os

from shim.contract import jsontext

_MAX_BYTES = 4 << 20
_CRIU_ERROR = r"^\([\d.]+\)\s+(?:\d+: )?Error \([^)]*\): (.*)$"
_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE",)
"""CRIU goes on after these errors. The first comes wherever CAP_SYS_RESOURCE is missing."""
_KILLED = "killed by signal 9"
"""Source: CRIU, criu/cr-restore.c, sigchld_process."""

_DUMPED = (b"Dumping FAILED", b"Dumping finished successfully")
_END_BYTES = 4096


class Cut(Exception):
    """CRIU ended, or was ended, while it may have had processes execute its code."""


def is_killed(reason: str) -> bool:
    """Returns whether a process that CRIU restored was killed from outside, as by the OOM killer.

    reason: of `first_error`. CRIU itself kills only after an error, which is the first.
    """
    return _KILLED in reason


def was_cut(directory: str) -> bool:
    """Returns whether CRIU ended in the middle of a dump: its log lacks the result.

    Source: CRIU, criu/cr-dump.c, cr_dump_finish.
    """
    try:
        with open(f"{directory}/dump.log", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
            last = file.read()
    except OSError:
        return True
    return not any(end in last for end in _DUMPED)


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
