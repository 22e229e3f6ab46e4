"""Reads the configuration of quickthawd: TOML files become one frozen record.

The fields of `Config` are the table: each row has its parser, its default and its help. The reader
of files and the writer of the commented file in the package both use this table. Run as a module,
this prints that file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from shim.contract import paths
from shim.contract.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")

YEAR_S: Final = 365 * 86400
LEVELS: Final = ("debug", "info", "warning", "error")


def key(default: Value, parse: Callable[[object], Value], about: str) -> Value:
    """Returns a row of the table. `parse` raises ValueError, which says what a value must be."""
    row: Value = dataclasses.field(default=default, metadata={"parse": parse, "help": about})
    return row


def absolute_path(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and "\0" not in value:
        return value
    raise ValueError("must be an absolute path")


def path_or_none(value: object) -> str:
    return "" if value == "" else absolute_path(value)


def program(value: object) -> str:
    """Accepts a name that PATH resolves, or an absolute path."""
    if isinstance(value, str) and re.fullmatch(r"[^/\0\s]+|/[^\0]+", value):
        return value
    raise ValueError("must be a program's name or absolute path")


def word(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        return value
    raise ValueError("must be a word of letters, digits, '.', '_' and '-'")


def plugin_index(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{2}", value):
        return value
    raise ValueError('must be two digits in quotes, like "90"')


def seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= YEAR_S:
        return float(value)
    raise ValueError("must be a number of seconds, above 0 and at most a year")


def count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("must be a whole number from 1")


def count_or_none(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62:
        return value
    raise ValueError("must be a whole number, 0 or more")


def percent(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 100:
        return float(value)
    raise ValueError("must be a number from 0 to less than 100")


def variable_names(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError('must be a list of names, like ["HOSTNAME"]')


def listen_address(value: object) -> str:
    if value == "":
        return ""
    pattern = r"(?:[^:\s]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if match and 0 < int(match[1]) < 65536:
        return match[0]
    raise ValueError('must be "HOST:PORT", "[IPV6]:PORT" or ""')


def level(value: object) -> str:
    if isinstance(value, str) and value in LEVELS:
        return value
    raise ValueError(f"must be one of {', '.join(LEVELS)}")


def yes_or_no(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("must be true or false")


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of an operator. Times are in seconds."""

    containerd_socket: str = key(
        "/run/containerd/containerd.sock",
        absolute_path,
        "containerd's own socket: the daemon reads records of containers and images there.",
    )
    containerd_state: str = key(
        "/run/containerd",
        absolute_path,
        "containerd's `state` directory, where the bundles of its tasks are.",
    )
    containerd_namespace: str = key(
        "k8s.io", word, "The containerd namespace of the pods. The CRI plugin always uses this one."
    )
    nri_socket: str = key("/var/run/nri/nri.sock", absolute_path, "containerd's NRI socket.")
    nri_plugin_name: str = key(
        "quickthaw", word, "The name under which quickthawd registers with NRI."
    )
    nri_plugin_index: str = key(
        "90",
        plugin_index,
        "The place among the NRI plugins. High, so that quickthawd sees the changes of the others.",
    )
    runtime_root: str = key(
        "/run/containerd/runc",
        absolute_path,
        "The `--root` that containerd's shim gives to runc, without the namespace at its end.",
    )
    criu: str = key("criu", program, "The criu program.")
    default_deadline_s: float = key(
        100.0,
        seconds,
        "The time limit of a swap whose pod sets no deadline. kubelet gives up after 120 s.",
    )
    max_deadline_s: float = key(
        110.0,
        seconds,
        "The longest time limit that a pod may set with quickthaw.io/deadline.",
    )
    capture_timeout_s: float = key(600.0, seconds, "The time limit of a capture.")
    frozen_limit_s: float = key(
        30.0,
        seconds,
        "The time limit of the frozen window of a capture. If the estimate for the container's\n"
        "memory plus 10 s is less, the estimate is the limit. At the limit quickthaw thaws the\n"
        "container, and the capture fails.",
    )
    readiness_timeout_s: float = key(
        3600.0, seconds, "How long the daemon waits for a pod's capture-when."
    )
    max_restores_at_once: int = key(
        8,
        count,
        "The number of restores that may run at the same time. Others wait in the restore queue.",
    )
    restore_wait_s: float = key(
        10.0,
        seconds,
        "How long a restore waits in the restore queue; then the container starts cold. A restore\n"
        "never waits longer than the pod's deadline.",
    )
    restore_hold_s: float = key(
        60.0,
        seconds,
        "How long a restore may run once it has left the restore queue; then the container starts\n"
        "cold. A restore never runs longer than the pod's deadline.",
    )
    max_captures_at_once: int = key(
        1, count, "The number of captures that may run at the same time."
    )
    max_snapshot_bytes: int = key(
        0,
        count_or_none,
        "The largest size of a snapshot on the disk. 0: the room alone is the limit.",
    )
    max_store_bytes: int = key(
        0,
        count_or_none,
        "The largest size of all snapshots together. 0: the room alone is the limit.",
    )
    keep_free_bytes: int = key(
        0,
        count_or_none,
        "The bytes that a capture leaves free on the file system of the snapshots.",
    )
    keep_free_percent: float = key(
        10.0,
        percent,
        "The same as a percentage of the file system, and of its inodes; the larger value counts.\n"
        "kubelet evicts pods when less than 10 percent are free.",
    )
    max_namespace_bytes: int = key(
        0,
        count_or_none,
        "The largest size of all snapshots of a Kubernetes namespace. A capture beyond this size\n"
        "evicts snapshots of its own namespace alone. 0: the room alone is the limit.",
    )
    namespace_percent: float = key(
        0.0,
        percent,
        "The share of each Kubernetes namespace in the room for snapshots, in percent. A capture\n"
        "evicts a snapshot of another namespace only while that namespace takes more than its\n"
        "share, and the namespace of the capture takes no more. 0: an equal share for each\n"
        "namespace that has snapshots.",
    )
    evict: bool = key(
        True,
        yes_or_no,
        "Whether a capture may evict unused snapshots to make room: snapshots of its own\n"
        "namespace before snapshots of others, the least recently used first.",
    )
    evict_after_s: float = key(
        600.0,
        seconds,
        "No capture evicts a snapshot that was made or used less than this long ago.",
    )
    quarantine_after: int = key(
        2,
        count_or_none,
        "The number of pods in a row whose restores from a snapshot must fail before the snapshot\n"
        "goes to quarantine and pods start cold (see `quickthaw quarantine`). A failure that a\n"
        "pod or its author causes does not count. 0: quarantine for damaged snapshots alone.",
    )
    ignore_env: tuple[str, ...] = key(
        (),
        variable_names,
        "Environment variables that may differ between the captured container and the new one.",
    )
    metrics_listen: str = key(
        "",
        listen_address,
        'The address at which Prometheus reads metrics, like "127.0.0.1:9645". Empty: off.',
    )
    kubeconfig: str = key(
        "",
        path_or_none,
        "The kubeconfig with which quickthawd sends events of pods to Kubernetes, like\n"
        '"/etc/kubernetes/kubelet.conf". Empty: off.',
    )
    log_level: str = key(
        "info", level, f"The lowest level of the lines in the journal: {', '.join(LEVELS)}."
    )
    cross_namespace: bool = key(
        False,
        yes_or_no,
        "Whether pods may start from a snapshot of another Kubernetes namespace. A snapshot holds\n"
        "the memory of the pod that was captured, with every secret in it.",
    )


ROWS: Final = dataclasses.fields(Config)

DROP_INS: Final = paths.DROP_INS
HEADER: Final = f"""\
# The configuration of quickthawd. Each key is shown with its default.
# Files named {DROP_INS}/*.toml are read later, in the order of their names; the
# last value of a key counts. A change takes effect with `systemctl restart quickthawd`.
"""


class Loaded(NamedTuple):
    """The configuration, and a line for each unknown key."""

    config: Config
    warnings: tuple[str, ...]


def bad(path: Path, why: str) -> BadConfig:
    return BadConfig(
        "cannot read the configuration",
        about=str(path),
        why=why,
        do="Correct the file and start quickthawd again.",
    )


def read(path: Path) -> dict[str, object]:
    """Returns the keys and values of a file, as TOML has them."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise bad(path, str(error)) from error


def parse(path: Path, found: dict[str, object]) -> dict[str, object]:
    """Returns the values of the known keys."""
    values: dict[str, object] = {}
    for row in ROWS:
        if row.name in found:
            try:
                values[row.name] = row.metadata["parse"](found[row.name])
            except ValueError as error:
                why = f"{row.name} {error}, not {found[row.name]!r}"
                raise bad(path, why) from error
    return values


def files(main: Path) -> list[Path]:
    """Returns the main file and its drop-ins in the order of reading. None of them need exist."""
    drop_ins = sorted(main.with_suffix(".d").glob("*.toml"))
    return [main, *drop_ins] if main.exists() else drop_ins


def load(main: Path = Path(paths.CONFIG)) -> Loaded:
    """Read `main` and its drop-ins. Raises BadConfig with the file, the key and the reason."""
    values: dict[str, Any] = {}
    warnings: list[str] = []
    known = {row.name for row in ROWS}
    for path in files(main):
        found = read(path)
        warnings += [
            f"{path}: unknown key {name!r}, ignored" for name in found if name not in known
        ]
        values |= parse(path, found)
    return Loaded(Config(**values), tuple(warnings))


def shown(value: object) -> str:
    """Returns a value as TOML. JSON's strings, numbers, lists and booleans are TOML too."""
    return json.dumps(value)


def default_file() -> str:
    """Returns the commented file for the package."""
    blocks = [HEADER]
    for row in ROWS:
        about = "".join(f"# {line}\n" for line in row.metadata["help"].splitlines())
        blocks.append(f"{about}#{row.name} = {shown(row.default)}\n")
    return "\n".join(blocks)


if __name__ == "__main__":
    sys.stdout.write(default_file())
