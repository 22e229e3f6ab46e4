"""Gives restored processes the new pod's OOM scores: CRIU restores the captured scores. Lean.

A score below the pod's own lets its processes survive at the expense of others. Source:
proc_pid_oom_score_adj(5).
"""

from __future__ import annotations

from shim.kernel import lineage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.oci.spec import Spec


def rescore(spec: Spec, pid: int, proc: str = "/proc") -> None:
    """Give process `pid` and all its descendants the score of the spec. The processes are running.

    A process with a score of its own choice, higher than the pod's, keeps it. Lowering a score
    needs CAP_SYS_RESOURCE: without that capability the processes keep the captured, higher score.
    Raises OSError.
    """
    wanted = spec.process.get("oomScoreAdj")
    if isinstance(wanted, int) and (base := _score(pid, proc)) is not None:
        _rescore(pid, wanted, base, proc)


def _rescore(pid: int, wanted: int, base: int, proc: str) -> None:
    score = _score(pid, proc)
    if score is not None and score != wanted and (score == base or score < wanted):
        try:
            with open(f"{proc}/{pid}/oom_score_adj", "w") as file:
                file.write(str(wanted))
        except (PermissionError, ProcessLookupError):
            pass
    # After the parent: a child that is forked meanwhile has its score already.
    for child in lineage.living_children(pid, proc):
        _rescore(child, wanted, base, proc)


def _score(pid: int, proc: str) -> int | None:
    try:
        with open(f"{proc}/{pid}/oom_score_adj") as file:
            return int(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None  # the process has ended
