"""Program: collects what the probe needs on a bare machine without network, in build/gpu/bundle.

    python3 -m tests.gpu.bundle

bin/         criu, runc: scripts that start the programs of libexec/ with the libraries of lib/
libexec/     the programs, as Debian forky ships them
lib/         their libraries, all but the C library's
libc/        Debian's C library and its loader, for machines whose own is older than the programs'
shim/kernel/ the parsers of /proc
tests/gpu/   the probe; so `cd bundle && python3 -m tests.gpu.probe --bundle . --out OUT` is enough

The CUDA program under test is compiled here too when there is an nvcc.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.node import base

ROOT: Final = Path(__file__).parents[2]
BUNDLE: Final = ROOT / "build" / "gpu" / "bundle"
MOST_BYTES: Final = 60 << 20
PROGRAMS: Final = ("usr/sbin/criu", "usr/sbin/runc")
OF_LIBC: Final = re.compile(r"(ld-linux|libc|libm|libdl|librt|libpthread|libresolv)\b.*\.so")
START: Final = """\
#!/bin/sh
# Starts {name} of this bundle with its libraries; its C library too where the machine's is older.
here=$(readlink -f "$0")
here=${{here%/bin/*}}
real=$here/libexec/{name}
export LD_LIBRARY_PATH="$here/lib"
have=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
if [ "$(printf '%s\\n' "$have" {libc} | sort -V | head -n 1)" = {libc} ]; then
    exec "$real" "$@"
fi
# runc starts itself again by /proc/self/exe, which then is the loader: not on such machines.
exec "$here/libc/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$here/lib:$here/libc" \\
    --argv0 {name} "$real" "$@"
"""


def main() -> int:
    """1 when the bundle is larger than it may be."""
    source = base.node_root("forky")
    shutil.rmtree(BUNDLE, ignore_errors=True)
    for name in ("bin", "libexec", "lib", "libc", "tests/gpu", "shim/kernel"):
        (BUNDLE / name).mkdir(parents=True)
    for program in PROGRAMS:
        collect(source, source / program)
    for path in (ROOT / "tests" / "gpu").iterdir():
        if path.is_file():
            shutil.copy2(path, BUNDLE / "tests" / "gpu")
    shutil.copy2(ROOT / "shim/kernel/procfs.py", BUNDLE / "shim/kernel")
    for package in ("tests", "shim", "shim/kernel"):
        (BUNDLE / package / "__init__.py").touch()
    compile_worker()
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    print(f"{BUNDLE}: {size / (1 << 20):.1f} MiB")
    return int(size > MOST_BYTES)


def collect(source: Path, program: Path, into: Path = BUNDLE) -> None:
    """A program, the script that starts it, and its libraries."""
    shutil.copy2(program, into / "libexec")
    said = subprocess.run(
        ["chroot", str(source), "ldd", f"/{program.relative_to(source)}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for library in re.findall(r"(/\S+) \(0x", said):
        path = source / library.removeprefix("/")
        place = "libc" if OF_LIBC.match(path.name) else "lib"
        shutil.copy2(path, into / place / path.name)
    script = into / "bin" / program.name
    script.write_text(START.format(name=program.name, libc=needed_libc(program)))
    script.chmod(0o755)


def needed_libc(program: Path) -> str:
    """The newest version of the C library that a program names, as 2.38."""
    names = re.findall(rb"\0GLIBC_(\d+)\.(\d+)\0", program.read_bytes())
    major, minor = max((int(major), int(minor)) for major, minor in names)
    return f"{major}.{minor}"


def compile_worker() -> None:
    """Left out without a compiler; the probe then compiles it where it runs."""
    if not shutil.which("nvcc"):
        return
    worker = [str(BUNDLE / "bin" / "worker"), str(ROOT / "tests" / "gpu" / "worker.cu")]
    # The C++ library inside: the machine's own may be another one.
    options = [
        "-arch=sm_90",
        "-O2",
        "-Xcompiler",
        "-static-libstdc++",
        "-Xcompiler",
        "-static-libgcc",
    ]
    subprocess.run(["nvcc", *options, "-o", *worker], check=True)


if __name__ == "__main__":
    sys.exit(main())
