"""Describes a snapshot: its identity, the containers that it fits, its origin, and its files.

The store writes the manifest when it publishes a snapshot. The daemon's index reads it, and so does
`quickthaw-runc` right before a swap. Strict, because the format is our own: an unknown or missing
key, a wrong type, or an id that is not the digest of the content makes it a BadManifest. `files`
has the digests of the listings, and each listing has the digests of all files in its part (see
`shim.integrity`), so that the id stands for every byte of the snapshot. Lean: the swap path imports
this module.
"""

from __future__ import annotations

import math
import os
import stat
import time

from shim.contract import jsontext
from shim.contract.errors import BadManifest
from shim.contract.jsontext import canonical
from shim.contract.names import is_snapshot_id, is_snapshot_name
from shim.contract.parts import PARTS
from shim.contract.paths import SNAPSHOT_MANIFEST
from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import ClassVar, NoReturn

    from shim.contract.names import SnapshotId
    from shim.contract.parts import SnapshotPart

SCHEMA = 5
MAX_BYTES = 8 * 1024 * 1024


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a string")
    value.encode()  # a lone surrogate, which nobody can print or compare, is a UnicodeEncodeError
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{value!r:.40} is not an object")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r:.40} is not a list")
    return tuple(_text(item) for item in value)


def _text_map(value: object) -> dict[str, str]:
    return {_text(key): _text(item) for key, item in _object(value).items()}


def _number_map(value: object) -> dict[str, float]:
    return {_text(key): _number(item) for key, item in _object(value).items()}


def _sha256(value: object) -> str:
    if not is_snapshot_id(_text(value)):
        raise ValueError(f"{value!r:.40} is not 64 hexadecimal digits")
    return str(value)


def _name(value: object) -> str:
    if _text(value) and not is_snapshot_name(str(value)):
        raise ValueError(f"{value!r:.40} is not a snapshot name")
    return str(value)


class _Record:
    """A frozen record whose fields `_parsers` checks. Two records with equal fields are equal."""

    __slots__ = ()
    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {}

    def __init__(self, **fields: object) -> None:
        if fields.keys() != self._parsers.keys():
            wrong = ", ".join(sorted(fields.keys() ^ self._parsers.keys()))
            raise ValueError(f"{type(self).__name__.lower()} has or lacks {wrong}")
        for name, parse in self._parsers.items():
            try:
                object.__setattr__(self, name, parse(fields[name]))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def __setattr__(self, name: str, _value: object) -> NoReturn:
        raise AttributeError(f"{name} of a {type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.as_json() == self.as_json()

    def __hash__(self) -> int:
        return hash(canonical(self.as_json()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.as_json()!r:.200})"

    def as_json(self) -> dict[str, object]:
        """Returns the record as a plain JSON object."""
        return {name: _plain(getattr(self, name)) for name in self._parsers}


def _plain(value: object) -> object:
    if isinstance(value, _Record):
        return value.as_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class CapturedContainer(_Record):
    """The captured container. command: its arguments. image_digest: `sha256:…`."""

    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {
        "namespace": _text, "pod": _text, "pod_uid": _text, "container": _text,
        "container_id": _text, "node": _text, "image": _text, "image_digest": _text,
        "command": _texts,
    }  # fmt: skip
    __slots__ = tuple(_parsers)
    namespace: str
    pod: str
    pod_uid: str
    container: str
    container_id: str
    node: str
    image: str
    image_digest: str
    command: tuple[str, ...]


class Software(_Record):
    """Versions of the software that made the snapshot. arch, kernel: as `uname -m`, `uname -r`."""

    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {
        "quickthaw": _text, "criu": _text, "runtime": _text, "kernel": _text, "arch": _text,
    }  # fmt: skip
    __slots__ = tuple(_parsers)
    quickthaw: str
    criu: str
    runtime: str
    kernel: str
    arch: str


class File(_Record):
    """A listing. path: in the snapshot's directory. size: in bytes."""

    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {
        "path": _text, "size": _count, "sha256": _sha256,
    }  # fmt: skip
    __slots__ = tuple(_parsers)
    path: str
    size: int
    sha256: str


class Sizes(_Record):
    """Bytes on disk of each part, its names and listing included. entries: inodes of all parts."""

    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {
        **{part.name: _count for part in PARTS},
        "entries": _count,
    }
    __slots__ = tuple(_parsers)
    criu: int
    rootfs: int
    shm: int
    memory: int
    entries: int

    @property
    def total(self) -> int:
        """Returns the bytes of all parts."""
        return sum(self.of(part) for part in PARTS)

    def of(self, part: SnapshotPart) -> int:
        """Returns the bytes of a part."""
        size: int = getattr(self, part.name)
        return size


class Requires(_Record):
    """The resources that a new container needs. memory_bytes: 0 for no requirement."""

    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {"memory_bytes": _count}
    __slots__ = tuple(_parsers)
    memory_bytes: int


def _record(kind: type[_Record]) -> Callable[[object], _Record]:
    def parse(value: object) -> _Record:
        return value if isinstance(value, kind) else kind(**_object(value))

    return parse


def _files(value: object) -> tuple[File, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r:.40} is not a list")
    files = tuple(item if isinstance(item, File) else File(**_object(item)) for item in value)
    if [file.path for file in files] != [part.listing for part in PARTS]:
        raise ValueError(f"they are not {', '.join(part.listing for part in PARTS)}")
    return files


class Manifest(_Record):
    """Everything about a snapshot. Create a manifest with `build`, which computes its id.

    name: from the annotation, or empty. key: the match key (see `shim.gate.key`). created_at: Unix
    time in seconds. created: the same time for people. facts: fact name to canonical JSON (see
    `shim.gate`). network: a plain JSON object with addresses, routes, mtu, sysctls and
    bound_addresses. timings: step name to seconds.
    """

    _parsers: ClassVar[Mapping[str, Callable[[object], object]]] = {
        "id": _sha256, "name": _name, "key": _sha256, "created_at": _number, "created": _text,
        "source": _record(CapturedContainer), "software": _record(Software), "facts": _text_map,
        "network": _object, "files": _files, "sizes": _record(Sizes), "timings": _number_map,
        "requires": _record(Requires),
    }  # fmt: skip
    __slots__ = tuple(_parsers)
    id: SnapshotId
    name: str
    key: str
    created_at: float
    created: str
    source: CapturedContainer
    software: Software
    facts: Mapping[str, str]
    network: Mapping[str, object]
    files: tuple[File, ...]
    sizes: Sizes
    timings: Mapping[str, float]
    requires: Requires

    def encode(self) -> bytes:
        """Returns the manifest as the JSON that `decode` accepts."""
        import json  # late: a restore only reads manifests

        return json.dumps({"schema": SCHEMA, **self.as_json()}, indent=1).encode() + b"\n"


def build(**fields: object) -> Manifest:
    """Returns a manifest; computes `id` and `created` from the other fields.

    Records may be given as records or as plain objects. Raises ValueError for a wrong field.
    """
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_number(fields.get("created_at"))))
    draft = Manifest(**{**fields, "id": "0" * 64, "created": created})
    return Manifest(**{**draft.as_json(), "id": _digest(draft)})


def content(manifest: Manifest) -> bytes:
    """Returns everything but the id, as the bytes whose SHA-256 digest is the id."""
    found = {"schema": SCHEMA, **manifest.as_json()}
    del found["id"]
    return canonical(found).encode()


def _digest(manifest: Manifest) -> str:
    return hexdigest(content(manifest))


def decode(data: bytes, *, where: str = "manifest") -> Manifest:
    """Returns the manifest in `data`. where: the name of the manifest in messages.

    Raises BadManifest for everything that `Manifest.encode` cannot have written; the message says
    so if the schema is newer than ours.
    """
    try:
        return _decode(data)
    except (ValueError, RecursionError) as error:
        raise BadManifest(
            "cannot read the manifest", about=where, why=str(error) or "nested too deep",
            do=_ADVICE.get(type(error), "Remove the snapshot; the next pod makes a new one."),
        ) from error  # fmt: skip


class _NewerSchema(ValueError):
    pass


class _OlderSchema(ValueError):
    pass


_ADVICE: dict[type[Exception], str] = {
    _NewerSchema: "Upgrade quickthaw on this node.",
    _OlderSchema: "Remove the snapshot; the next pod makes a new one.",
}


def _decode(data: bytes) -> Manifest:
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    fields = _object(jsontext.parse(data))
    schema = fields.pop("schema", None)
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise _NewerSchema(
            f"schema {schema}, this quickthaw reads {SCHEMA}; upgrade quickthaw on this node"
        )
    if schema in (1, 2, 3, 4) and not isinstance(schema, bool):
        raise _OlderSchema(f"schema {schema}, of an older quickthaw")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(f"no schema that this quickthaw reads: {schema!r:.40}")
    manifest = Manifest(**fields)
    if manifest.id != _digest(manifest):
        raise ValueError("the id is not the digest of the content: somebody changed the manifest")
    return manifest


def read(snapshot_dirfd: int, *, snapshot: str) -> Manifest:
    """Returns the manifest in a snapshot's directory, whose id must be `snapshot`.

    Raises BadManifest, also when the file is missing or not a regular file.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(SNAPSHOT_MANIFEST, flags, dir_fd=snapshot_dirfd)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError("not a regular file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadManifest(
            "cannot read the manifest", about=snapshot, why=str(error),
            do="Remove the snapshot; the next pod makes a new one.",
        ) from error  # fmt: skip
    manifest = decode(data, where=snapshot)
    if manifest.id != snapshot:
        raise BadManifest(
            "cannot use the manifest", about=snapshot, why=f"its id is {manifest.id}",
            do="Move the directory to the name of its id.",
        )  # fmt: skip
    return manifest
