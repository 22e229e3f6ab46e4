"""`quickthaw explain`: shows the gate's comparison of a container with a snapshot, by check."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from shim.cli import client
from shim.contract.errors import QuickthawError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "compare a container with a snapshot, and tell why the snapshot fits or does not fit"
EXAMPLES: Final = """\
examples:
  quickthaw explain models/inference-0               with the nearest of its candidates
  quickthaw explain inference-0 --snapshot 3f2a91c0
  quickthaw explain ./config.json --snapshot 3f2a91c0 --image-digest sha256:...

POD is NAMESPACE/POD or POD, of a container that opted in and exists. SPEC is the path of an OCI
config.json (write ./NAME for a file in the working directory); it is compared here, without the
daemon. What a spec does not say is taken from the options, and is `unknown`, which fits nothing,
where they do not say it either.

exit status: 0 it fits; 1 it does not; 2 an error.
"""
FITS, DOES_NOT, ERROR = 0, 1, 2
_COLUMNS = ("CHECK", "RULE", "FITS", "SNAPSHOT", "POD")
_CAPTURE_COLUMNS = ("CAPTURE WITH GPUS", "FITS", "SEEN", "REMEDY")
_EQUAL_CHARS, _DIFFERENT_CHARS = 40, 400


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="POD|SPEC", help="a pod of this node, or the path of an OCI spec"
    )
    parser.add_argument(
        "--snapshot", default="", help="an id, the unique beginning of an id, or [NAMESPACE/]NAME; "
        "explain looks for a NAME alone in the pod's namespace first",
    )  # fmt: skip
    parser.add_argument("-n", "--namespace", default="", help="the pod's Kubernetes namespace")
    parser.add_argument("-c", "--container", default="", help="the name of a container of POD")
    spec = parser.add_argument_group("of a SPEC")
    spec.add_argument(
        "--image-digest", default="", metavar="sha256:…", help="the digest of the image"
    )
    spec.add_argument("--pod-name", default="", help="default: the spec's annotation")
    spec.add_argument("--pod-uid", default="", help="default: the spec's annotation")
    spec.add_argument("--pod-ip", action="append", default=[], help="repeat for each address")
    spec.add_argument(
        "--ignore-env", action="append", default=[], metavar="NAME",
        help="as `ignore_env` of the configuration, which explain does not read",
    )  # fmt: skip
    spec.add_argument(
        "--any-namespace", action="store_true", help="as `cross_namespace` of the configuration"
    )
    spec.add_argument("--criu", default="criu", help="CRIU's program (default: criu)")


def run(asked: Namespace, out: Output) -> int:
    try:
        answer = _of_spec(asked, out) if _is_spec(asked.what) else _of_pod(asked)
    except QuickthawError as error:
        out.error(error)
        return ERROR
    except OSError as error:
        out.note(f"{error.filename or asked.what}: {error.strerror or error}")
        return ERROR
    if out.as_json:
        out.json(answer)
    else:
        _show(answer, out)
    return FITS if answer["fits"] and not answer.get("quarantine") else DOES_NOT


def _is_spec(what: str) -> bool:
    """Whether `what` is a path, and not NAMESPACE/POD."""
    return what.startswith(("/", "./", "../")) or what.endswith(".json") or os.path.isfile(what)


def _of_pod(asked: Namespace) -> dict[str, Any]:
    namespace, slash, pod = asked.what.rpartition("/")
    wanted = {"pod": pod, "namespace": namespace if slash else asked.namespace}
    wanted |= {"container": asked.container, "snapshot": asked.snapshot}
    return client.ask("explain", **{name: value for name, value in wanted.items() if value})


def _of_spec(asked: Namespace, out: Output) -> dict[str, Any]:
    from shim.cli import explain_spec  # here: an explanation of a pod need not pay for this

    return explain_spec.explain(asked, out)


def _show(answer: dict[str, Any], out: Output) -> None:
    container = answer["container"]
    named = "/".join(filter(None, (container.get(part) for part in ("namespace", "pod"))))
    source = answer["source"]
    out.fields({
        "container": f"{named or container.get('spec', '')} {container.get('container', '')}",
        "state": ": ".join(filter(None, [container.get("state"), container.get("reason")])),
        "snapshot": f"{answer['snapshot']} ({answer['chosen']})",
        "captured": f"{answer['created']} of {source['namespace']}/{source['pod']}",
        "fits": "yes" if answer["fits"] else f"no: {', '.join(answer['refused'])}",
    })  # fmt: skip
    if answer.get("quarantine"):
        out.note(
            f"the snapshot is in quarantine, and no pod starts from it: {answer['quarantine']}"
        )
    out.line()
    out.table(_COLUMNS, [_cells(check) for check in answer["checks"]])
    if capture := answer.get("capture"):
        out.line()
        out.table(_CAPTURE_COLUMNS, [
            [row["code"], "yes" if row["fits"] else "NO", row["why"] or row["compares"], row["do"]]
            for row in capture
        ])  # fmt: skip


def _cells(check: dict[str, Any]) -> list[str]:
    captured, wanted = check["differences"]
    most = _EQUAL_CHARS if check["fits"] else _DIFFERENT_CHARS
    return [
        check["code"], str(check["rule"]), "yes" if check["fits"] else "NO",
        _short(captured, most), _short(wanted, most),
    ]  # fmt: skip


def _short(value: str, most: int) -> str:
    return value if len(value) <= most else f"{value[: most - 1]}…"
