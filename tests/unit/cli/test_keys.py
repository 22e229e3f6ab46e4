"""`quickthaw keys`, which needs no daemon."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from shim.cli import keys as verb
from shim.cli import main
from shim.contract.errors import KeyRefused, NoSuchKey
from shim.trust import change, keyfile
from tests.unit.trusting import keys_in

if TYPE_CHECKING:
    from pathlib import Path

    from shim.trust.keys import KeyDirectory

OTHER = keyfile.make().public
Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyDirectory:
    found = keys_in(tmp_path / "keys")
    monkeypatch.setattr(verb, "directory", lambda: found)
    return found


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Writes node.pub of another node, as a file."""
    file = tmp_path / "node-7.pub"
    file.write_bytes(OTHER.pem())
    return str(file)


def asked(capsys: Capsys, *arguments: str) -> Any:
    assert main.main(["keys", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def roles(capsys: Capsys) -> dict[str, str]:
    return {row["id"]: row["role"] for row in asked(capsys, "ls")["keys"]}


def test_a_key_is_trusted_and_revoked_by_its_name(
    keys: KeyDirectory, other: str, capsys: Capsys
) -> None:
    own = keys.private().public.id
    assert asked(capsys, "init") == {"id": own, "made": False}
    assert asked(capsys, "trust", other) == {"id": OTHER.id, "name": "node-7", "added": True}
    assert roles(capsys) == {own: "node", OTHER.id: "trusted"}
    assert asked(capsys, "revoke", "node-7")["added"]
    assert roles(capsys) == {own: "node", OTHER.id: "revoked"}


def test_rotation_prints_both_keys(keys: KeyDirectory, capsys: Capsys) -> None:
    old = keys.private().public.id
    told = asked(capsys, "rotate")
    assert told == {"id": keys.private().public.id, "former": old}
    assert roles(capsys) == {told["id"]: "node", old: "trusted"}
    assert asked(capsys, "revoke", old[:8])["id"] == old


def test_a_key_can_come_through_a_pipe(
    keys: KeyDirectory, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(OTHER.pem())))
    assert asked(capsys, "trust", "-", "--name", "node-7")["name"] == "node-7"


@pytest.mark.parametrize("action", ["init", "trust", "ls", "revoke", "rotate"])
def test_people_get_text(keys: KeyDirectory, other: str, capsys: Capsys, action: str) -> None:
    change.trust(keys, OTHER.pem(), "node-7")
    own = keys.private().public.id
    more = {"trust": [other], "revoke": ["node-7"]}.get(action, [])
    assert main.main(["keys", action, *more]) == 0
    told = capsys.readouterr().out
    assert (own if action in ("init", "ls", "rotate") else OTHER.id) in told
    assert "{" not in told
    assert action != "rotate" or f"stays trusted, as former-{own}" in told


def test_faults_of_the_keys_are_reported(
    keys: KeyDirectory, tmp_path: Path, capsys: Capsys
) -> None:
    (tmp_path / "keys/revoked.d/lost.pub").write_bytes(b"?")
    (tmp_path / "keys/node.key").chmod(0o644)
    assert main.main(["keys", "ls"]) == 0
    told = capsys.readouterr().err
    assert "no key counts, and every pod starts cold" in told
    assert "chmod 0600" in told
    assert "revoked.d/lost.pub" in asked(capsys, "ls")["broken"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["revoke", "no-such"], NoSuchKey),
        (["trust", "/dev/null"], KeyRefused),
        (["trust", "/dev/zero"], KeyRefused),
    ],
)
def test_a_refusal_has_its_own_exit_status(
    keys: KeyDirectory, capsys: Capsys, arguments: list[str], error: type[KeyRefused | NoSuchKey]
) -> None:
    assert main.main(["keys", *arguments, "--json"]) == error.exit_code
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["class"] == error.__name__
    assert "Traceback" not in told.err


def test_missing_file_is_reported(keys: KeyDirectory, capsys: Capsys) -> None:
    assert main.main(["keys", "trust", "/no/such/file"]) == 1
    assert "/no/such/file: No such file" in capsys.readouterr().err
