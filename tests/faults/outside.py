"""Faults from outside."""

from tests.faults.cases import Case
from tests.faults.ground import Ground
from tests.faults.restoring import Seen


def run(ground: Ground, case: Case) -> Seen:
    """A whole case."""
    raise NotImplementedError
