"""`quickthaw capture`: makes a snapshot of a running container now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shim.cli import client
from shim.kernel.steps import durations

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "make a snapshot of a running container now; the container goes on serving"
EXAMPLES: Final = """\
examples:
  quickthaw capture inference-0
  quickthaw capture models/inference-0 -c server
  quickthaw capture inference-0 -n models --timeout 1800
"""
_TIMEOUT_S = 1200.0


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pod", metavar="[NAMESPACE/]POD", help="the pod's name")
    parser.add_argument("-n", "--namespace", default="", help="the pod's Kubernetes namespace")
    parser.add_argument("-c", "--container", default="", help="the name of a container of the pod")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS",
        help="how long the command waits; capture_timeout_s limits the capture itself",
    )  # fmt: skip


def run(asked: Namespace, out: Output) -> int:
    namespace, slash, pod = asked.pod.rpartition("/")
    wanted = {"pod": pod, "namespace": namespace if slash else asked.namespace}
    wanted["container"] = asked.container
    given = {name: value for name, value in wanted.items() if value}
    answer = client.ask("capture", within_s=max(asked.timeout, 0.001), **given)
    if out.as_json:
        out.json(answer)
        return 0
    timings = durations(answer["timings"])
    steps = ", ".join(f"{step} {seconds:.3f} s" for step, seconds in timings.items())
    out.line(f"{answer['id']}  {steps}".rstrip())
    return 0
