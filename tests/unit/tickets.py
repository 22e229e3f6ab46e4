"""Makes tickets for unit tests."""

from shim.contract.ticket import Ticket

SNAPSHOT = "5" * 64


def a_ticket(**changes: object) -> Ticket:
    fields: dict[str, object] = {
        "container": "abc", "snapshot": SNAPSHOT, "fallback": "cold", "deadline_s": 100.0,
        "turns": 4, "turn_wait_s": 10.0, "turn_hold_s": 60.0,
        "pod_namespace": "default", "pod_name": "pod", "pod_uid": "uid", "container_name": "main",
        "resume": "", "gpu_pairs": [], "others": 0,
    }  # fmt: skip
    return Ticket(**fields | changes)
