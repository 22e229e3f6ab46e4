"""Makes swaps for unit tests, in a directory of the test."""

import json
from pathlib import Path

from shim.oci.call import Call
from shim.restore.steps import Swap
from tests.unit.tickets import a_ticket


def a_swap(place: Path, until: float, **changes: object) -> Swap:
    """A swap with its bundle and all its own files in `place`. changes: of the ticket."""
    (place / "config.json").write_text(json.dumps({"root": {"path": "rootfs"}}))
    call = Call("create", "abc", [], {"--bundle": str(place)})
    swap = Swap(call, a_ticket(**changes), ["runc"], until)
    swap.private, swap.images, swap.work = (f"{place}/{name}" for name in ("own", "img", "work"))
    (place / "own").mkdir()
    return swap
