from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cli import client
from shim.contract import errors
from shim.contract.errors import BadRequest, DaemonAway, NoSuchSnapshot, QuickthawError
from shim.daemon import control

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CLASSES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, QuickthawError)
]


async def echo(request: Mapping[str, Any]) -> dict[str, Any]:
    return {"echo": dict(request)}


async def refuse(request: Mapping[str, Any]) -> dict[str, Any]:
    error = NoSuchSnapshot("cannot find", about=control.text(request, "id"), why="w", do="d")
    error.add_note("near: b")
    raise error


async def broken(_request: Mapping[str, Any]) -> dict[str, Any]:
    raise KeyError("a mistake of ours")


async def not_json(_request: Mapping[str, Any]) -> dict[str, Any]:
    return {"odd": object()}


HANDLERS = {"echo": echo, "refuse": refuse, "broken": broken, "not_json": not_json}


def served(
    tmp_path: Path, use: Callable[[str], object], uid: int | None = None, within_s: float = 5.0
) -> object:
    """Returns the result of `use`, run in a thread with a served socket."""
    path = str(tmp_path / "control.sock")

    async def both() -> object:
        serving = asyncio.create_task(
            control.serve(
                HANDLERS, path=path, uid=os.getuid() if uid is None else uid, within_s=within_s
            )
        )
        while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240 - the bind is what runs next
            await asyncio.sleep(0)
        try:
            return await asyncio.to_thread(use, path)
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    return asyncio.run(both())


def raw(path: str, line: bytes, *, end: bool = False) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(line)
        if end:
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as file:
            answer: dict[str, Any] = json.loads(file.readline())
            return answer


def test_a_request_is_answered(tmp_path: Path) -> None:
    answer = served(tmp_path, lambda path: client.ask("echo", path=path, id="x", force=True))
    assert answer == {"echo": {"id": "x", "force": True}}


def test_socket_belongs_to_root_alone_and_is_removed_at_the_end(tmp_path: Path) -> None:
    mode = served(tmp_path, lambda path: os.stat(path).st_mode)
    assert isinstance(mode, int)
    assert stat.S_IMODE(mode) == 0o600
    assert not list(tmp_path.iterdir())


def test_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    for name in ("control.sock.new",):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / name))
    assert served(tmp_path, lambda path: client.ask("echo", path=path)) == {"echo": {}}


def test_other_users_get_no_answer(tmp_path: Path) -> None:
    def use(path: str) -> None:
        with pytest.raises(BadRequest, match="only root"):
            client.ask("echo", path=path)

    served(tmp_path, use, uid=os.getuid() + 1)


def test_an_error_arrives_with_all_its_parts(tmp_path: Path) -> None:
    def use(path: str) -> QuickthawError:
        with pytest.raises(NoSuchSnapshot) as caught:
            client.ask("refuse", path=path, id="abc")
        return caught.value

    error = served(tmp_path, use)
    assert isinstance(error, NoSuchSnapshot)
    assert (error.what, error.about, error.why, error.do) == ("cannot find", "abc", "w", "d")
    assert error.__notes__ == ["near: b"]


@pytest.mark.parametrize("verb", ["broken", "not_json"])
def test_internal_error_ends_a_single_request(tmp_path: Path, verb: str) -> None:
    def use(path: str) -> dict[str, Any]:
        with pytest.raises(QuickthawError, match="Error: "):
            client.ask(verb, path=path)
        return client.ask("echo", path=path)

    assert served(tmp_path, use) == {"echo": {}}


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"[]\n", b"{}\n", b'{"verb": 1}\n', b'{"verb": "format disk"}\n', b"\xff\n",
        b'{"verb": "refuse"}\n', b'{"verb": "refuse", "id": 7}\n', b"[" * 60_000 + b"\n",
        b"x" * (control.MAX_REQUEST_BYTES * 4) + b"\n",
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused(tmp_path: Path, line: bytes) -> None:
    answer = served(tmp_path, lambda path: raw(path, line))
    assert isinstance(answer, dict)
    assert answer["error"]["class"] == "BadRequest"


def test_unfinished_request_is_refused_in_time(tmp_path: Path) -> None:
    answer = served(tmp_path, lambda path: raw(path, b'{"verb"'), within_s=0.05)
    assert isinstance(answer, dict)
    assert "no line within" in answer["error"]["why"]


def test_client_that_disconnects_stops_nothing(tmp_path: Path) -> None:
    def use(path: str) -> dict[str, Any]:
        for line in (b"", b'{"verb": "echo"}\n'):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                connection.sendall(line)
        return client.ask("echo", path=path)

    assert served(tmp_path, use) == {"echo": {}}


@given(st.binary(max_size=100))
def test_parse_raises_only_its_documented_error(line: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(control.parse(line)["verb"], str)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_error_crosses_the_socket(kind: type[QuickthawError]) -> None:
    error = kind("what", about="c", why="why", do="do")
    with pytest.raises(kind) as caught:
        client.decode(control.refusal(error))
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)


def test_a_class_that_only_a_newer_daemon_has_keeps_its_exit_status() -> None:
    with pytest.raises(QuickthawError) as caught:
        client.decode(b'{"error": {"class": "Newer", "what": "w", "exit_code": 77}}')
    assert caught.value.exit_code == 77


@given(st.binary(max_size=60) | st.from_regex(rb'\{"(error|result)": .{0,20}\}', fullmatch=True))
def test_client_raises_quickthaw_errors_only(line: bytes) -> None:
    with contextlib.suppress(QuickthawError):
        assert isinstance(client.decode(line), dict)


@pytest.mark.parametrize("answer", [b"", b"{}\n", b"half"])
def test_daemon_without_an_answer_counts_as_down(tmp_path: Path, answer: bytes) -> None:
    async def both() -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(answer)
            writer.close()

        server = await asyncio.start_unix_server(talk, tmp_path / "s")
        async with server:
            with pytest.raises(DaemonAway):
                await asyncio.to_thread(client.ask, "ls", path=str(tmp_path / "s"))

    asyncio.run(both())


def test_hanging_daemon_counts_as_down_in_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(DaemonAway, match="no answer within"):
            client.ask("ls", path=str(tmp_path / "s"), within_s=0.05)


def test_missing_socket_counts_as_daemon_down(tmp_path: Path) -> None:
    with pytest.raises(DaemonAway, match="systemctl start"):
        client.ask("ls", path=str(tmp_path / "none"))
