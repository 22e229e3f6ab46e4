"""Reads from a kubeconfig what an HTTPS request needs. Strict where a mistake would be unsafe.

Source: the Kubernetes documentation, "Organizing Cluster Access Using kubeconfig Files", and
client-go's clientcmd/api/v1 types. Plug-ins that run programs are not supported: a root daemon does
not execute programs that a file names.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import ssl
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MAX_BYTES = 1 << 20
_MAX_BRACKETS = 1000
"""The YAML reader's time grows with the square of the nesting: 0.2 s for this many brackets."""
_REFUSED_USER = ("exec", "auth-provider", "username", "password", "as", "as-uid", "as-groups",
                 "as-user-extra")  # fmt: skip
_REFUSED_CLUSTER = ("proxy-url",)


class BadKubeconfig(ValueError):
    """The kubeconfig cannot be used. The message names the file's own keys."""


@dataclass(frozen=True, slots=True)
class Access:
    """The address of the API server, and the credentials for it.

    path: of the server's URL, without a slash at its end. token: empty without a token.
    """

    host: str
    port: int
    path: str
    server_name: str
    token: str
    tls: ssl.SSLContext


def load(path: str) -> Access:
    """Read a kubeconfig and the files that it names. Raises BadKubeconfig, OSError.

    Read the kubeconfig again for each connection: certificates and tokens are rotated.
    """
    with open(path, "rb") as file:
        found = _parsed(file.read(_MAX_BYTES))
    context = _named(found, "contexts", "context", _text(found, "current-context"))
    cluster = _named(found, "clusters", "cluster", _text(context, "cluster"))
    user = _named(found, "users", "user", _text(context, "user"))
    _refuse("user", user, _REFUSED_USER)
    _refuse("cluster", cluster, _REFUSED_CLUSTER)
    beside = Path(path).parent  # relative names in the file start from its directory
    server = _server(_text(cluster, "server"))
    name = _text(cluster, "tls-server-name", "") or str(server.hostname)
    prefix = server.path.rstrip("/")
    return Access(
        str(server.hostname), server.port or 443, prefix, name, _token(user, beside),
        _tls(cluster, user, beside),
    )  # fmt: skip


def _parsed(data: bytes) -> dict[str, Any]:
    if data.count(b"[") + data.count(b"{") > _MAX_BRACKETS:
        raise BadKubeconfig(f"more than {_MAX_BRACKETS} lists and objects in brackets")
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadKubeconfig(f"not YAML: {error}") from error
    if not isinstance(found, dict):
        raise BadKubeconfig("not a YAML mapping")
    return found


def _named(found: Mapping[str, Any], many: str, one: str, name: str) -> dict[str, Any]:
    entries = found.get(many)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("name") == name:
            value = entry.get(one)
            return value if isinstance(value, dict) else {}
    raise BadKubeconfig(f"{many} has no {name!r}")


def _text(found: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = found.get(key, default)
    if value is None or not isinstance(value, str) or (default is None and not value):
        raise BadKubeconfig(f"{key} is missing or not a string")
    return value


def _refuse(what: str, found: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if wrong := [key for key in keys if found.get(key)]:
        raise BadKubeconfig(
            f"the {what} has {', '.join(wrong)}, which quickthaw does not support: use a client "
            "certificate or a token"
        )


def _server(url: str) -> urllib.parse.SplitResult:
    try:
        found = urllib.parse.urlsplit(url)
        port_is_right = found.port != 0
    except ValueError as error:
        raise BadKubeconfig(f"server {url!r}: {error}") from error
    if found.scheme != "https" or not found.hostname or not port_is_right or found.username:
        raise BadKubeconfig(f"server {url!r} is not https://HOST[:PORT]")
    return found


def _token(user: Mapping[str, Any], beside: Path) -> str:
    # As in client-go, tokenFile wins over token: the file is rotated.
    if name := _text(user, "tokenFile", ""):
        token = (beside / name).read_text(encoding="ascii", errors="replace").strip()
    else:
        token = _text(user, "token", "")
    if any(not "!" <= char <= "~" for char in token):
        raise BadKubeconfig("the token has characters that an HTTP header cannot have")
    return token


def _tls(cluster: Mapping[str, Any], user: Mapping[str, Any], beside: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    insecure = cluster.get("insecure-skip-tls-verify", False)
    if not isinstance(insecure, bool):
        raise BadKubeconfig("insecure-skip-tls-verify is neither true nor false")
    try:
        if insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif authority := _data(cluster, "certificate-authority", beside):
            context.load_verify_locations(cadata=authority.decode("ascii"))
        else:
            context.load_default_certs()
        certificate = _data(user, "client-certificate", beside)
        key = _data(user, "client-key", beside)
        if bool(certificate) != bool(key):
            raise BadKubeconfig("client-certificate and client-key belong together")
        if certificate:
            with _as_file(certificate) as first, _as_file(key) as second:
                context.load_cert_chain(first, second, password=_no_password)
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise BadKubeconfig(f"a certificate or key cannot be used: {error}") from error
    return context


def _no_password() -> str:
    """Refuse a key with a password, instead of a question at a terminal."""
    raise BadKubeconfig("the client key has a password")


def _data(found: Mapping[str, Any], key: str, beside: Path) -> bytes:
    """Returns the content of `KEY-data`, or of the file that `KEY` names; empty without either."""
    if encoded := _text(found, f"{key}-data", ""):
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise BadKubeconfig(f"{key}-data is not base64: {error}") from error
    name = _text(found, key, "")
    return (beside / name).read_bytes() if name else b""


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Yields a path for `data`, which stays in memory: a private key is written to no disk."""
    fd = os.memfd_create("quickthaw", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
