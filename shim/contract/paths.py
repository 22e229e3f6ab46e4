"""Where things are on a node. The only module with path strings.

Strings, not `pathlib`: the swap path imports this one.
"""

RUN = "/run/quickthaw"
"""Root only. Gone at boot, like everything that it describes."""
TICKETS = f"{RUN}/tickets"
"""`ID.json`, from the daemon to `quickthaw-runc create`. The shell front knows it."""
SWAPPED = f"{RUN}/swapped"
"""`ID`, a file that exists while container ID is a restored one. The shell front knows it."""
CONTAINERS = f"{RUN}/containers"
"""`ID/`, root only: what is ours about one container that opted in (see CONTAINER_*)."""
CONTROL = f"{RUN}/control"
"""`ID/`, a small tmpfs that the container sees at CONTROL_IN_CONTAINER and may write."""
OUTCOMES = f"{RUN}/outcomes"
"""`ID.json`, written by `quickthaw-runc`, read by the daemon: how one swap ended."""
LOGS = f"{RUN}/logs"
"""`SNAPSHOT.log`: CRIU's log of the last restore from that snapshot that failed."""
SOCKET = f"{RUN}/quickthawd.sock"
FAULTS = f"{RUN}/faults.json"
"""Made by a person who tests failures; see `shim.contract.faults`."""

CONTAINER_CRIU_CONF = "criu.conf"
"""In CONTAINERS/ID: named by the `org.criu.config` annotation of the container."""
CONTAINER_JOURNAL = "journal"
"""In CONTAINERS/ID: what a swap changed on the host, one line before each change."""
CONTAINER_NETWORK_PLAN = "network-plan.json"
"""In CONTAINERS/ID, written before a restore whose network needs the hook. The shell part of
`quickthaw-hook` knows it."""
CONTAINER_WORK = "work"
"""In CONTAINERS/ID: CRIU's work directory of the last capture or restore, with its log."""

CONTROL_IN_CONTAINER = "/run/quickthaw"
READY_FILE = "ready"
RESTORED_FILE = "restored.json"

STORE = "/var/lib/quickthaw"
SNAPSHOTS = f"{STORE}/snapshots"
STAGING = f"{STORE}/staging"
QUARANTINE = f"{STORE}/quarantine"

SNAPSHOT_MANIFEST = "manifest.json"
"""In SNAPSHOTS/ID, as the following."""
SNAPSHOT_CRIU = "criu"
SNAPSHOT_ROOTFS = "rootfs"
SNAPSHOT_SHM = "shm"

ETC = "/etc/quickthaw"
CONFIG = f"{ETC}/quickthaw.toml"
RUNTIME = f"{ETC}/runtime"
"""One line: the absolute path of the real OCI runtime. The shell front reads it."""
PREFIX = "/usr/lib/quickthaw"
