"""`make storm`: changes memory in every way while it is being filled; writes build/storm.json.

    MINUTES=10 or SECONDS=60      how long, in all (10 minutes)
    LEVELS=direct,node            direct: without a container, filled slowly; node, a fifth of the
                                  time: a captured pod is restored by the package again and again
    SEED=N                        of the first round; later rounds count on from it
    SUITE=forky

Exit status 1 for a wrong byte or a hang.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console

from tests.storm import direct
from tests.storm.direct import ROOT, Round

RESULT: Final = ROOT / "build" / "storm.json"
ROUND_S: Final = 1.5
NODE_PART: Final = 0.2
LEVELS: Final = ("direct", "node")


def main() -> int:
    """Run the storm. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make storm")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--suite", default="forky")
    options = parser.parse_args()
    levels = [level for level in LEVELS if level in options.levels.split(",")]
    out = Console(highlight=False, soft_wrap=True)
    node_s = options.seconds * (NODE_PART if len(levels) > 1 else 1.0)
    found: dict[str, Any] = {}
    if "direct" in levels:
        rest = options.seconds - (node_s if "node" in levels else 0.0)
        found["direct"] = _sum(_some(_direct(options.seed), rest), out)
    if "node" in levels:
        from tests.storm import onnode  # late: only a node needs its imports

        with onnode.prepared(options.suite) as node:
            found["node"] = _sum(_some(onnode.rounds(node, onnode.worker()), node_s), out)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for level, each in found.items():
        out.print(
            f"{level}: {each['rounds']} rounds in {each['seconds']} s, "
            f"{sum(each['operations'].values())} operations, {each['wrong']} wrong, "
            f"{each['hangs']} hangs"
        )
    good = all(not each["failures"] and each["rounds"] for each in found.values())
    return 0 if good and found else 1


def _direct(seed: int) -> Iterator[Round]:
    while True:
        yield direct.run(*direct.chosen(seed, ROUND_S))
        seed += 1


def _some(rounds: Iterable[Round], seconds: float) -> Iterator[Round]:
    """Yields rounds that begin within `seconds`."""
    until = time.monotonic() + seconds
    for each in rounds:
        yield each
        if time.monotonic() > until:
            return


def _sum(rounds: Iterator[Round], out: Console) -> dict[str, Any]:
    """Returns the sums. wrong: the number of reports, each about a page or a failed process."""
    began, count, filling_s = time.monotonic(), 0, 0.0
    operations: Counter[str] = Counter()
    failures = []
    for each in rounds:
        count += 1
        filling_s += each.filling_s
        operations.update(each.operations)
        if not each.is_good:
            failures.append(asdict(each))
            out.print(f"[red]Wrong:[/red] seed {each.seed}: {_first(each)}")
    return {
        "rounds": count,
        "operations": dict(sorted(operations.items())),
        "wrong": sum(len(each["wrong"]) for each in failures),
        "hangs": sum(len(each["hangs"]) for each in failures),
        "seconds": round(time.monotonic() - began, 1),
        "filling_seconds": round(filling_s, 1),
        "seeds": [each["seed"] for each in failures],
        "failures": failures,
    }


def _first(found: Round) -> str:
    told = (found.hangs + found.wrong)[0]
    return str(told.get("error") or told.get("what"))[-800:]


if __name__ == "__main__":
    raise SystemExit(main())
