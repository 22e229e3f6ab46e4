"""The gate on a page: every check between a snapshot and the container that will start from it.

Each row has a code (stable: the reason in the journal, a metric's label, a column of `quickthaw
explain`), the number of a rule, a time of use, and a comparison. The gate always applies all rows,
and reports everything that does not fit. A value that the snapshot lacks, or that is not known of
the container, does not fit.

The rules: 1 everything but process state and the writable layer comes from the pod's own spec, so
the spec must start the same processes; 2 the captured credentials come back, so everything that
grants power must be equal; 3 a snapshot is for its own namespace; 4 the node must be able to run
the processes; 5 a trusted node must have captured the snapshot.

To compare something new, add one row: a check that needs more than manifest and request gets a
field of Request. Lean: the swap path applies the rows of SWAP right before the restore.
"""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.jsontext import canonical
from shim.gate import gpu, host
from shim.gate.facts import WORKLOAD_FACTS
from shim.gate.refusal import Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shim.contract.manifest import Manifest
    from shim.gate.request import Request

    Compared = tuple[str | None, str | None, bool]
    Compare = Callable[[Manifest, Request], Compared]

DECISION, SWAP, BOTH = "decision", "swap", "both"
WITHIN_SPEC = canonical("within the spec")
"""The fact `processes`, when no captured process had more power than the spec gives."""


class Check:
    """A row. when: DECISION (the daemon), SWAP (right before the restore) or BOTH."""

    __slots__ = ("by", "code", "compares", "rule", "when")

    def __init__(self, code: str, rule: int, when: str, compares: str, by: Compare) -> None:
        self.code, self.rule, self.when, self.compares, self.by = code, rule, when, compares, by

    def compare(self, captured: Manifest, wanted: Request) -> Finding:
        """Returns the row's finding for this snapshot and this container."""
        have, want, fits = self.by(captured, wanted)
        return Finding(self.code, self.rule, have, want, fits)


def findings(
    captured: Manifest, wanted: Request, when: str, table: Sequence[Check] | None = None
) -> list[Finding]:
    """Returns the findings of all rows that apply at `when`, in the order of the table."""
    rows = CHECKS if table is None else table
    return [row.compare(captured, wanted) for row in rows if row.when in (when, BOTH)]


def _fact(name: str, fits: Callable[[str, str], bool]) -> Compare:
    """Returns a comparison of the fact of the same name on both sides."""

    def compare(captured: Manifest, wanted: Request) -> Compared:
        have, want = captured.facts.get(name), wanted.facts.get(name)
        return have, want, have is not None and want is not None and fits(have, want)

    return compare


def _same(have: str, want: str) -> bool:
    return have == want


def _power(code: str, compares: str) -> Check:
    return Check(code, 2, BOTH, compares, _fact(code, _same))


def _workload(code: str, compares: str, rule: int = 1) -> Check:
    return Check(code, rule, DECISION, compares, _fact(code, _same))


def _host(code: str, compares: str, fits: Callable[[str, str], bool] = _same) -> Check:
    return Check(code, 4, DECISION, compares, _fact(code, fits))


def _gpus(code: str, compares: str) -> Check:
    """Facts that no process that uses GPUs can be restored with: the new container has none."""
    return _host(code, compares, lambda _have, want: want == gpu.NONE)


def _signature(captured: Manifest, wanted: Request) -> Compared:
    told, trusted = wanted.node.trust(captured)
    return told or None, "a signature by a key that this node trusts", trusted


def _processes(captured: Manifest, _wanted: Request) -> Compared:
    have = captured.facts.get("processes")
    return have, WITHIN_SPEC, have == WITHIN_SPEC


def _descriptors(captured: Manifest, wanted: Request) -> Compared:
    """Compares, at the swap, ports and pings that the captured pod's network allowed everybody."""
    have = captured.facts.get("descriptors")
    if have is None or wanted.at_swap is None:
        return have, WITHIN_SPEC, have is not None
    used = jsontext.parse(have)
    if not used["lowest_port"] and not used["pings"]:
        return have, WITHIN_SPEC, True
    first_port, pings = wanted.at_swap.open_to_all()
    fits = (not used["lowest_port"] or used["lowest_port"] >= first_port) and (
        pings or not used["pings"]
    )
    return have, canonical({"first_port": first_port, "pings": pings}), fits


def _key(captured: Manifest, wanted: Request) -> Compared:
    """Fits if a workload fact differs: the fact's own row reports that, and the key need not."""
    told = any(captured.facts.get(name) != wanted.facts.get(name) for name in WORKLOAD_FACTS)
    return captured.key, wanted.key or None, told or captured.key == wanted.key


def _namespace(captured: Manifest, wanted: Request) -> Compared:
    have, want = captured.source.namespace, wanted.namespace
    return have, want or None, wanted.any_namespace or bool(want and have == want)


def _arch(captured: Manifest, wanted: Request) -> Compared:
    have, want = captured.software.arch, wanted.node.arch
    return have, want or None, have == want


def _kernel(captured: Manifest, wanted: Request) -> Compared:
    have, want = captured.software.kernel, wanted.node.kernel
    return have, want or None, host.is_not_older(want, have)


def _criu(captured: Manifest, wanted: Request) -> Compared:
    have, want = captured.software.criu, wanted.node.criu
    return have, want or None, host.is_not_older(want, have)


def _criu_options(_captured: Manifest, wanted: Request) -> Compared:
    at_swap = wanted.at_swap
    if at_swap is None:
        return None, None, False
    return at_swap.ours, at_swap.named, at_swap.ours == at_swap.named


def _volume_files(captured: Manifest, wanted: Request) -> Compared:
    have = captured.facts.get("volume_files")
    if have is None or wanted.at_swap is None:
        return have, None, False
    try:
        changed = wanted.at_swap.changed(jsontext.parse(have))
    except ValueError as error:
        changed = [str(error)]
    return have, canonical({"changed": changed}), not changed


def _volume_content(captured: Manifest, wanted: Request) -> Compared:
    have, want = captured.facts.get("volume_content"), wanted.facts.get("volume_content")
    is_known = have is not None and "not read: " not in have
    return have, want, wanted.any_volume_content or (is_known and have == want)


def _memory(captured: Manifest, wanted: Request) -> Compared:
    needed, limit = captured.requires.memory_bytes, wanted.memory_limit_bytes
    given = f"a limit of {limit} bytes" if limit else "no limit"
    return f"{needed} bytes in use", given, not limit or limit >= needed


CHECKS: tuple[Check, ...] = (
    _power("user", "user, group, supplementary groups, umask"),
    _power("capabilities", "all five capability sets"),
    _power("no_new_privs", "whether set-user-ID programs can raise power"),
    _power("seccomp", "digest of the system call filter"),
    _power("apparmor", "AppArmor profile"),
    _power("selinux", "SELinux labels of processes and mounts"),
    _power("rlimits", "resource limits"),
    _power("namespaces", "per kind: new, joined, or the host's"),
    _power("id_mappings", "user and group ID mappings"),
    _power("devices", "device nodes; GPUs by their number, not by which ones"),
    _power("device_rules", "cgroup's device rules, in their order"),
    _power("mounts", "destination, type, options of every mount"),
    _power("masked_paths", "paths hidden from the container"),
    _power("readonly_paths", "paths that it cannot write"),
    _power("sysctls", "kernel parameters"),
    _power("root_readonly", "whether the root file system is read-only"),
    _power("root_propagation", "propagation of the root mount"),
    _power("terminal", "whether there is a terminal"),
    _power("personality", "execution domain"),
    _power("scheduler", "scheduling policy"),
    _power("other", "fields of the spec that quickthaw does not know"),
    Check("processes", 2, BOTH, "whether a captured process had more power than its spec gives",
          _processes),
    Check("descriptors", 2, BOTH, "whether a captured descriptor took more power than its spec, or "
          "the pod's network, gives", _descriptors),
    Check("volume_files", 2, SWAP,
          "open files in volumes: type, owner and mode of each, no link on the way, and no other "
          "container in the pod while CRIU makes a deleted one again",
          _volume_files),
    Check("key", 1, DECISION, "digest over what makes two containers the same workload", _key),
    _workload("args", "command line"),
    _workload("cwd", "working directory"),
    _workload("env", "environment, without what differs from pod to pod"),
    _workload("process_user", "user and group of the process"),
    _workload("mounted", "what every mount shows: which volume, which path of the node"),
    Check("volume_content", 1, DECISION, "what Secret and ConfigMap volumes hold, unless the pod "
          "ignores it", _volume_content),
    _workload("process_devices", "which devices; GPUs by their number"),
    _workload("hugepages", "huge page limits"),
    Check("namespace", 3, DECISION, "Kubernetes namespace", _namespace),
    _workload("image_digest", "digest of the image", rule=4),
    Check("arch", 4, DECISION, "machine architecture", _arch),
    Check("kernel", 4, DECISION, "kernel: not older than the captured one (major.minor)", _kernel),
    Check("criu", 4, DECISION, "CRIU: not older than the one that captured (major.minor)", _criu),
    _host("cpu_features", "instructions: all that the captured process may have chosen",
          host.has_all),
    _host("cpu_state", "size and parts of the saved CPU state: equal, as libc keeps the size"),
    _host("cpu_hwcap", "AT_HWCAP and its like: all bits of the captured ones", host.has_bits),
    _host("page_bytes", "page size"),
    _host("cgroup", "cgroup version"),
    _host("gpu", "model, number, memory, driver of the GPUs; MIG off", gpu.fits),
    _gpus("gpu_exclusive", "compute mode of the GPUs: not exclusive (nvidia-smi -c DEFAULT)"),
    _gpus("gpu_mps", "no variables of MPS: what runs under MPS cannot be restored"),
    _gpus("gpu_host_network", "a network of its own: the driver's socket would be there twice"),
    Check("memory", 4, BOTH, "memory limit: room for what was in use at the capture", _memory),
    Check("signature", 5, DECISION, "who has signed the snapshot", _signature),
    Check("criu_options", 5, SWAP, "the file with CRIU's options: ours, not one that a pod names",
          _criu_options),
)  # fmt: skip
"""All checks. Keep each row on one line if it fits: people read this table."""
