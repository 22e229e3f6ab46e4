"""Kubernetes events as the installed daemon sends them, to an HTTPS server on the node.

The server is no API server: tests/unit compares the events with the documented schema.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.certificates import SERVED_AS, Authority
from tests.node.node import Node
from tests.node.swapping import (
    assert_cold,
    captured,
    first_answer,
    probe,
    restored,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

PORT = 6443
DIRECTORY = "/etc/quickthaw/test-events"
DROP_IN = "/etc/quickthaw/quickthaw.d/90-events.toml"
SERVER = """
import http.server, json, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open("requests", "a") as file:
            told = {"method": self.command, "path": self.path, "body": json.loads(body)}
            file.write(json.dumps(told) + "\\n")
        self.send_response(201)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_PATCH = do_POST
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain("server.crt", "server.key")
tls.load_verify_locations("ca.crt")
tls.verify_mode = ssl.CERT_REQUIRED
server.socket = tls.wrap_socket(server.socket, server_side=True)
open("listening", "w").close()
server.serve_forever()
"""


@pytest.fixture(scope="module")
def told(swap_node: Node) -> Iterator[Path]:
    """Yields the file with the received requests, a request on each line."""
    directory = swap_node.path(DIRECTORY)
    directory.mkdir()
    Authority(directory)
    (directory / "serve.py").write_text(SERVER)
    cluster = {
        "server": f"https://127.0.0.1:{PORT}", "certificate-authority": "ca.crt",
        "tls-server-name": SERVED_AS,
    }  # fmt: skip
    user = {"client-certificate": "node.crt", "client-key": "node.key"}
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": user}],
    }  # fmt: skip
    (directory / "config").write_text(yaml.safe_dump(config))
    serve = f"cd {DIRECTORY} && exec python3 serve.py {PORT}"
    server = swap_node.popen(["sh", "-c", serve])
    try:
        wait_until((directory / "listening").exists, "the server does not listen", swap_node)
        with configured(swap_node):
            yield directory / "requests"
    finally:
        server.kill()
        server.wait()
        swap_node.run(["rm", "-r", DIRECTORY])
        wipe_snapshots(swap_node)


@contextlib.contextmanager
def configured(node: Node) -> Iterator[None]:
    node.path(DROP_IN).parent.mkdir(exist_ok=True)
    with node.daemon_stopped():
        node.write(DROP_IN, f'kubeconfig = "{DIRECTORY}/config"\n')
    try:
        yield
    finally:
        with node.daemon_stopped():
            node.path(DROP_IN).unlink()


def events(told: Path, pod: str) -> dict[str, dict[str, Any]]:
    """Returns the events of a pod, by their reason."""
    lines = told.read_text().splitlines() if told.exists() else []
    found = [json.loads(line)["body"] for line in lines]
    return {
        body["reason"]: body for body in found if body.get("involvedObject", {}).get("name") == pod
    }


def test_events_report_the_fate_of_a_pod(swap_node: Node, told: Path) -> None:
    spec = probe(env={"CASE": "events"})
    captured(swap_node, spec).source.remove(grace_s=0)
    pod = restored(swap_node, spec)
    late = {"quickthaw.io/restore": "auto", "quickthaw.io/deadline": "0.01s"}
    slow = swap_node.kubelet.run_pod("late", [spec], annotations=late)
    wrong = swap_node.kubelet.run_pod("wrong", [spec], annotations=wishes(snapshot="No Name"))
    for each in (slow, wrong):
        first_answer(each)
        assert_cold(each.container())
    said(swap_node, slow.container().id[:12], "deadline passed")
    for name, reason, kind in (
        ("source", "Captured", "Normal"), ("replica", "Restored", "Normal"),
        ("late", "SwapTooLate", "Warning"), ("wrong", "BadAnnotation", "Warning"),
    ):  # fmt: skip
        wait_until(lambda: reason in events(told, name), f"no {reason} of {name}", swap_node)  # noqa: B023
        event = events(told, name)[reason]
        assert event["type"] == kind
        assert event["involvedObject"]["fieldPath"] == "spec.containers{main}"
    assert events(told, "replica")["Restored"]["involvedObject"]["uid"] == pod.uid
