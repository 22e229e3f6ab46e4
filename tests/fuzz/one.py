"""One target under atheris: `python -m tests.fuzz.one NAME [LIBFUZZER ARGUMENTS]`.

Only our own code is instrumented: what is counted as coverage is a branch of ours.
"""

import logging
import sys

import atheris

with atheris.instrument_imports(include=["shim", "hook"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Until libFuzzer ends the process."""
    logging.disable()  # a message for each odd input would be all that it does
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


main()
