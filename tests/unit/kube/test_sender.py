"""Kubernetes events, against an HTTPS server that checks as a real API server would.

A real API server is not available here: the test compares with the documented schema of Event v1.
"""

import base64
import http.server
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shim.kube import event as events
from shim.kube import sender as sending
from shim.kube.event import EventMemory, Known, PodEvent, Rate
from shim.kube.kubeconfig import BadKubeconfig, load
from shim.kube.sender import Sender
from tests.certificates import SERVED_AS, Authority

TOKEN = "token-1"  # noqa: S105 - of no one
SOON_S = 10.0
EVENT_FIELDS = {
    "apiVersion", "kind", "metadata", "involvedObject", "type", "reason", "message", "source",
    "firstTimestamp", "lastTimestamp", "count", "reportingComponent", "reportingInstance",
}  # fmt: skip
WHEN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


# The server


class Api:
    """The received requests, and the answers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], dict[str, Any], str]] = []
        self.answers: list[int] = []
        self.stored: set[str] = set()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> int:
        if self.answers:
            return self.answers.pop(0)
        if method == "POST":
            self.stored.add(f"{path}/{body['metadata']['name']}")
            return 201
        return 200 if path in self.stored else 404


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def api(authority: Authority) -> Iterator[tuple[Api, int]]:
    found = Api()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            peer = self.connection.getpeercert() or {}
            who = str(dict(pair[0] for pair in peer.get("subject", ())).get("commonName", ""))
            found.requests.append((self.command, self.path, dict(self.headers), body, who))
            status = found.answer(self.command, self.path, body)
            said = {"kind": "Status", "message": "not\nso"} if status >= 300 else body
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PATCH = do  # noqa: N815 - the library's names

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # clients that do not trust the server go away in the handshake

    server = Quiet(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.files["server"])
    tls.load_verify_locations(cadata=authority.ca.decode())
    tls.verify_mode = ssl.CERT_OPTIONAL
    server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def kubeconfig(
    path: Path, port: int, user: dict[str, Any], cluster: dict[str, Any], prefix: str = ""
) -> Path:
    url = f"https://127.0.0.1:{port}{prefix}"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "here",
                "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}],
                "users": [{"name": "u", "user": user}],
            }
        )
    )  # fmt: skip
    return path


class Told:
    """A sender, and its counts."""

    def __init__(self, path: Path) -> None:
        self.counted: list[str] = []
        self.sender = Sender(str(path), self.counted.append, node="node-1", wait_s=0.01)
        self.sender.start()

    def tell(self, *told: PodEvent) -> list[str]:
        for each in told:
            self.sender.send(each)
        deadline = time.monotonic() + SOON_S
        while len(self.counted) < len(told):
            assert time.monotonic() < deadline, "nothing became of the event"
            time.sleep(0.005)
        found, self.counted[:] = list(self.counted), []
        return found


@pytest.fixture
def start() -> Iterator[Callable[[Path], Told]]:
    started: list[Told] = []

    def begin(path: Path) -> Told:
        started.append(Told(path))
        return started[-1]

    yield begin
    for each in started:
        each.sender.stop()


def an_event(**changed: str) -> PodEvent:
    fields = {
        "namespace": "models", "pod": "inference-0", "uid": "u-1", "container": "server",
        "kind": events.WARNING, "reason": "CriuRestoreFailed", "message": "it failed",
    }  # fmt: skip
    return PodEvent(**fields | changed)


def trusted(authority: Authority) -> dict[str, Any]:
    return {"certificate-authority-data": b64(authority.ca), "tls-server-name": SERVED_AS}


def test_event_has_the_documented_schema(
    api: tuple[Api, int], authority: Authority, tmp_path: Path, start: Callable[[Path], Told]
) -> None:
    server, port = api
    told = start(kubeconfig(tmp_path / "k", port, {"token": TOKEN}, trusted(authority)))
    assert told.tell(an_event()) == ["sent"]
    ((method, path, headers, body, _who),) = server.requests
    assert (method, path) == ("POST", "/api/v1/namespaces/models/events")
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["Content-Type"] == "application/json"
    assert body.keys() == EVENT_FIELDS
    assert (body["apiVersion"], body["kind"], body["type"]) == ("v1", "Event", "Warning")
    assert body["involvedObject"] == {
        "apiVersion": "v1", "kind": "Pod", "namespace": "models", "name": "inference-0",
        "uid": "u-1", "fieldPath": "spec.containers{server}",
    }  # fmt: skip
    assert body["metadata"]["namespace"] == "models", "it must be the one of the object"
    assert body["source"] == {"component": "quickthaw", "host": "node-1"}
    assert (body["reason"], body["message"], body["count"]) == ("CriuRestoreFailed", "it failed", 1)
    assert WHEN.fullmatch(body["firstTimestamp"])
    assert body["firstTimestamp"] == body["lastTimestamp"]
    assert SUBDOMAIN.fullmatch(body["metadata"]["name"])


def test_repeated_event_raises_the_count(
    api: tuple[Api, int], authority: Authority, tmp_path: Path, start: Callable[[Path], Told]
) -> None:
    server, port = api
    told = start(kubeconfig(tmp_path / "k", port, {"token": TOKEN}, trusted(authority)))
    told.tell(an_event(), an_event(message="and again"), an_event(container="side"))
    first, again, other = server.requests
    assert [each[0] for each in server.requests] == ["POST", "PATCH", "POST"]
    assert again[1] == f"{first[1]}/{first[3]['metadata']['name']}"
    assert again[2]["Content-Type"] == "application/strategic-merge-patch+json"
    assert again[3].keys() == {"count", "lastTimestamp", "message"}
    assert (again[3]["count"], again[3]["message"]) == (2, "and again")
    assert other[3]["count"] == 1
    server.stored.clear()  # an API server forgets events after an hour
    assert told.tell(an_event()) == ["sent"]
    assert [each[0] for each in server.requests[3:]] == ["PATCH", "POST"]
    assert server.requests[-1][3]["count"] == 1


@pytest.mark.parametrize("how", ["data", "files", "token file"])
def test_every_way_to_authenticate_works(
    api: tuple[Api, int],
    authority: Authority,
    tmp_path: Path,
    start: Callable[[Path], Told],
    how: str,
) -> None:
    server, port = api
    certificate, key = authority.pems["node"]
    users: dict[str, dict[str, Any]] = {
        "data": {"client-certificate-data": b64(certificate), "client-key-data": b64(key)},
        "files": {"client-certificate": "node.crt", "client-key": "node.key"},
        "token file": {"tokenFile": "token", "token": "stale"},
    }
    beside = authority.files["node"][0].parent
    cluster: dict[str, Any] = trusted(authority)
    if how == "files":
        cluster = {"certificate-authority": "ca.crt", "tls-server-name": SERVED_AS}
    (beside / "token").write_text("rotated\n")
    told = start(kubeconfig(beside / f"config-{how[:4]}", port, users[how], cluster, "/clusters/7"))
    assert told.tell(an_event()) == ["sent"]
    _, path, headers, _, who = server.requests[0]
    assert path == "/clusters/7/api/v1/namespaces/models/events"
    if how == "token file":
        assert headers["Authorization"] == "Bearer rotated"
    else:
        assert who == "node"
        assert "Authorization" not in headers


@pytest.mark.parametrize("why", ["another authority", "another name"])
def test_untrusted_server_receives_nothing(
    api: tuple[Api, int],
    authority: Authority,
    tmp_path: Path,
    start: Callable[[Path], Told],
    why: str,
) -> None:
    server, port = api
    cluster = trusted(authority)
    if why == "another authority":
        cluster["certificate-authority-data"] = b64(Authority(tmp_path).ca)
    else:
        cluster["tls-server-name"] = "other.test"
    told = start(kubeconfig(tmp_path / "k", port, {"token": TOKEN}, cluster))
    assert told.tell(an_event()) == ["failed"]
    assert server.requests == []


def test_insecure_skip_tls_verify_is_honoured(
    api: tuple[Api, int], tmp_path: Path, start: Callable[[Path], Told]
) -> None:
    _, port = api
    insecure = {"insecure-skip-tls-verify": True}
    told = start(kubeconfig(tmp_path / "k", port, {"token": TOKEN}, insecure))
    assert told.tell(an_event()) == ["sent"]


def test_only_transient_errors_are_retried(
    api: tuple[Api, int],
    authority: Authority,
    tmp_path: Path,
    start: Callable[[Path], Told],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, port = api
    told = start(kubeconfig(tmp_path / "k", port, {"token": TOKEN}, trusted(authority)))
    server.answers = [500, 429]
    assert told.tell(an_event()) == ["sent"]
    server.answers = [403]
    assert told.tell(an_event(reason="Forbidden")) == ["failed"]
    server.answers = [403]
    assert told.tell(an_event(reason="Forbidden")) == ["failed"]
    lines = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert len(lines) == 1, "one line every few minutes"
    assert "403: not so; 1 events lost. Pods are not affected." in lines[0]
    assert told.tell(an_event(reason="Next")) == ["sent"], "it goes on"


def test_a_kubeconfig_may_come_later(
    api: tuple[Api, int], authority: Authority, tmp_path: Path, start: Callable[[Path], Told]
) -> None:
    _, port = api
    told = start(tmp_path / "k")
    assert told.tell(an_event()) == ["failed"]
    kubeconfig(tmp_path / "k", port, {"token": TOKEN}, trusted(authority))
    assert told.tell(an_event()) == ["sent"]


def test_silent_server_blocks_no_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_STOP_S", 0.1)
    hanging = threading.Event()

    def load(_: str) -> Any:
        hanging.wait(SOON_S)
        raise BadKubeconfig("at last")

    told = Told(tmp_path / "none")
    monkeypatch.setattr(sending, "load", load)
    began = time.monotonic()
    for number in range(2000):
        told.sender.send(an_event(uid=f"u-{number}"))
    assert time.monotonic() - began < 1
    assert told.counted.count("dropped") >= 2000 - sending._QUEUE - 1
    told.sender.stop()
    assert time.monotonic() - began < 2
    hanging.set()
    told.sender._thread.join(SOON_S)


# Kubeconfigs that are refused


@pytest.mark.parametrize(
    ("user", "cluster", "why"),
    [
        ({"exec": {"command": "aws"}}, {}, "the user has exec"),
        ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider"),
        ({"username": "a", "password": "b"}, {}, "username, password"),
        ({"as": "system:masters"}, {}, "the user has as"),
        ({}, {"proxy-url": "http://p"}, "proxy-url"),
        ({}, {"server": "http://127.0.0.1:80"}, "is not https"),
        ({}, {"server": "https://"}, "is not https"),
        ({}, {"server": "https://a:b@c"}, "is not https"),
        ({}, {"server": "https://a:99999"}, "server"),
        ({}, {"insecure-skip-tls-verify": "yes"}, "neither true nor false"),
        ({}, {"certificate-authority-data": "!"}, "not base64"),
        ({}, {"certificate-authority-data": "AAAA"}, "cannot be used"),
        ({"client-certificate-data": "AAAA"}, {}, "belong together"),
        ({"token": "a\r\nX-Evil: b"}, {}, "HTTP header cannot"),
        ({"token": 7}, {}, "not a string"),
    ],
)
def test_unsupported_field_is_refused_by_name(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], why: str
) -> None:
    path = kubeconfig(tmp_path / "k", 1, user, cluster)
    with pytest.raises(BadKubeconfig, match=re.escape(why)):
        load(str(path))


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "!!python/object/apply:os.system ['true']", "contexts: 7"]
)
def test_file_that_is_no_kubeconfig_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text)
    with pytest.raises(BadKubeconfig):
        load(str(tmp_path / "k"))


# Limits of the API


@given(st.text(max_size=2000), st.integers(4, 1024))
def test_messages_fit_the_limits_of_the_api(text: str, most: int) -> None:
    found = events.shortened(text, most)
    assert len(found.encode()) <= most
    assert found == text or found.endswith("…") or "?" in found


@given(st.text())
def test_reasons_are_camel_case(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9]{1,128}", events.camel(text))
    assert events.camel("no-such snapshot") == "NoSuchSnapshot"
    assert events.camel("CriuRestoreFailed") == "CriuRestoreFailed"


def test_event_names_are_valid_however_long_the_pod_name() -> None:
    for pod in ("a", "a" * 253, "a" * 234 + "." * 2 + "b" * 17):
        name = events.name_of(an_event(pod=pod), 1_700_000_000.123)
        assert len(name) <= 253
        assert SUBDOMAIN.fullmatch(name)


def test_events_of_a_constantly_failing_pod_are_rate_limited() -> None:
    rate = Rate(burst=10, refill_s=60)
    assert [rate.allows("a", 0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert rate.allows("b", 0.0), "the others are not affected"
    assert [rate.allows("a", 61.0), rate.allows("a", 61.0)] == [True, False]


def test_remembered_events_are_bounded() -> None:
    memory = EventMemory()
    for number in range(3000):
        memory.remember(an_event(uid=str(number)), Known("n", 0.0, 1))
    assert memory.again(an_event(uid="0")) is None
    assert memory.again(an_event(uid="2999")) == Known("n", 0.0, 2)
