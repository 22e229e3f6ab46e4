"""Generate `protos/*_pb2.py`, their type stubs and gRPC stubs from the .proto files next to this.

`--check` generates into a temporary directory instead and fails when the result differs from
what is checked in. A .proto that declares a gRPC service that we call over gRPC is named in GRPC.
"""

import argparse
import contextlib
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
GRPC = {
    "containerd_containers",
    "containerd_events",
    "containerd_images",
    "containerd_snapshots",
    "containerd_tasks",
    "containerd_version",
    "cri",
}
"""Stems of the files whose services are called over gRPC; NRI's are ttrpc and get none."""
INCLUDE = files("grpc_tools") / "_proto"
"""google/protobuf/*.proto, as protoc's Python package brings them."""


def plugin(name: str) -> list[str]:
    """How protoc finds a plugin that is installed beside this Python."""
    return [f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"]


def generate(into: Path) -> None:
    """Write the generated modules below `into`, as package `protos`."""
    for proto in sorted(HERE.glob("*.proto")):
        arguments = [f"-I{HERE.parent}", f"-I{INCLUDE}", *plugin("mypy")]
        arguments += [f"--python_out={into}", f"--mypy_out=quiet:{into}"]
        if proto.stem in GRPC:
            arguments += plugin("mypy_grpc")
            arguments += [f"--grpc_python_out={into}", f"--mypy_grpc_out=quiet:{into}"]
        if protoc.main(["protoc", *arguments, f"protos/{proto.name}"]):
            raise SystemExit(f"protoc refused {proto.name}")


def generated(root: Path) -> dict[str, bytes]:
    """Name and content of every generated file below `root`/protos."""
    return {path.name: path.read_bytes() for path in (root / "protos").glob("*_pb2*.py*")}


def main() -> None:
    """Generate, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    if not parser.parse_args().check:
        generate(HERE.parent)
        return
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(HERE.parent):
        (Path(scratch) / "protos").mkdir()
        generate(Path(scratch))
        want, have = generated(Path(scratch)), generated(HERE.parent)
    stale = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    if stale:
        raise SystemExit(f"generated code is stale, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
