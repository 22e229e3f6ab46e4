"""Runs a target under atheris: `python -m tests.fuzz.one NAME [LIBFUZZER ARGUMENTS]`.

Only our own code is instrumented: coverage counts branches of ours.
"""

import logging
import sys

import atheris

with atheris.instrument_imports(include=["shim", "hook"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    logging.disable()  # otherwise the target would spend its time on messages about odd inputs
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


main()
