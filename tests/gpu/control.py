"""How the probe talks to a process under test: files, which survive what CRIU does to a process.

The probe writes `ask.N`, the process answers with `reply.N`; N counts from 1. `reply.0` says that
the process is ready. Pipes would have their other end outside of what CRIU dumps.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ask = Callable[[str, str], dict[str, Any]]


def reply(home: Path, number: int, answer: dict[str, Any]) -> None:
    """Complete or not there."""
    (home / "reply.new").write_text(json.dumps(answer))
    (home / "reply.new").rename(home / f"reply.{number}")


def serve(home: Path, ask: Ask, between: Callable[[], None] = lambda: None) -> None:
    """Answer until told to exit; `between` is called when there is nothing to answer."""
    number = 1
    while True:
        between()
        try:
            words = (home / f"ask.{number}").read_text()
        except FileNotFoundError:
            time.sleep(0.003)
            continue
        verb, _, argument = words.partition(" ")
        reply(home, number, {} if verb == "exit" else guarded(ask, verb, argument))
        if verb == "exit":
            sys.stdout.flush()
            os._exit(0)
        number += 1


def guarded(ask: Ask, verb: str, argument: str) -> dict[str, Any]:
    """The answer, or the error as one: the process must go on."""
    try:
        return ask(verb, argument)
    except Exception as error:  # noqa: BLE001 - the border of the process under test
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
