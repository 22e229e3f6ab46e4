"""Faults from outside: others on a node disturb CRIU, our processes, the store and the pod."""

import signal
from typing import Final

from tests.faults import damage, direct, driver, dumping, processes, shortage
from tests.faults.cases import Case
from tests.faults.ground import Ground
from tests.faults.processes import Scene
from tests.faults.restoring import Seen


def run(ground: Ground, case: Case) -> Seen:
    """Run a whole case, and put everything back. Raises WentWrong, AssertionError."""
    try:
        return SCENES[case.phase, case.fault](ground, case)
    finally:
        if case.phase in _DAMAGE_SNAPSHOT:
            ground.mend_snapshot()


_DAMAGE_SNAPSHOT: Final = (
    "restore: images", "restore: manifest", "restore: rootfs diff", "restore: clock",
    "restore: memory", "restore: device memory",
)  # fmt: skip
SCENES: Final[dict[tuple[str, str], Scene]] = {
    ("restore: CRIU", "killed"): processes.criu_at_restore(signal.SIGKILL),
    ("restore: CRIU", "stopped"): processes.criu_at_restore(signal.SIGSTOP),
    ("restore: quickthaw-runc", "killed"): processes.shim_at_restore(signal.SIGKILL),
    ("restore: quickthaw-runc", "stopped"): processes.shim_at_restore(signal.SIGSTOP),
    ("restore: page server", "killed before the processes run"): processes.page_server(
        signal.SIGKILL, "memory.started"
    ),
    ("restore: page server", "stopped before the processes run"): processes.page_server(
        signal.SIGSTOP, "memory.started"
    ),
    ("restore: page server", "killed while it fills"): processes.page_server(
        signal.SIGKILL, "memory.filling"
    ),
    ("restore: page server", "stopped while it fills"): processes.page_server(
        signal.SIGSTOP, "memory.filling"
    ),
    ("restore: its guard", "killed"): processes.its_guard(signal.SIGKILL),
    ("restore: its guard", "stopped"): processes.its_guard(signal.SIGSTOP),
    ("restore: memory", "bit flipped"): damage.memory_damaged,
    ("restore: restored process", "killed before resume"): processes.restored_process,
    ("restore: daemon", "killed between create and start"): processes.daemon,
    ("restore: daemon", "killed during the swap"): processes.daemon,
    ("restore: daemon", "stopped before create"): processes.daemon,
    ("restore: daemon", "stopped between create and start"): processes.daemon,
    ("restore: containerd", "restarted during the swap"): processes.containerd_restarts,
    ("restore: images", "truncated"): damage.damaged(damage._truncate),
    ("restore: images", "bit flipped"): damage.damaged(damage._flip),
    ("restore: images", "a file removed"): damage.damaged(damage._remove_image),
    ("restore: images", "removed while they are read"): damage.removed_while_read,
    ("restore: manifest", "truncated"): damage.damaged(damage._truncate_manifest),
    ("restore: rootfs diff", "removed"): damage.damaged(damage._remove_diff),
    ("restore: /run/quickthaw", "full"): shortage.run_is_full,
    ("restore: /dev/shm", "full"): shortage.shm_is_full,
    ("restore: /dev/shm", "a name is taken"): shortage.shm_is_taken,
    ("restore: memory limit", "too small"): shortage.memory_too_small,
    ("restore: mount", "its source is missing"): shortage.mount_is_missing,
    ("restore: network namespace", "gone"): shortage.netns_is_gone,
    ("restore: clock", "the snapshot is of the future"): shortage.clock_jumped,
    **driver.SCENES,
    **direct.SCENES,
    ("capture: CRIU", "killed"): dumping.criu_at_dump(signal.SIGKILL),
    ("capture: CRIU", "stopped"): dumping.criu_at_dump(signal.SIGSTOP),
    ("capture: daemon", "killed while CRIU dumps"): dumping.daemon_at_dump,
    ("capture: daemon", "stopped while frozen"): dumping.daemon_at_dump,
    ("capture: containerd", "restarted while CRIU dumps"): dumping.containerd_at_dump,
    ("capture: store", "full"): dumping.store_is_full,
    ("capture: source", "killed while CRIU dumps"): dumping.source_dies,
}
