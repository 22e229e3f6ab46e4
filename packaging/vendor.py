"""Third-party wheels for the packages: `lock` pins them, `tree` unpacks them.

The pins of setup.cfg name only our own imports. packaging/wheels.lock adds the wheels that they
need, with the digest of every file, so that two builds ship the same bytes and `tree` refuses a
changed file.

    vendor.py lock        resolve setup.cfg again and write packaging/wheels.lock
    vendor.py tree DIR    make DIR/pure (one copy for every CPython) and DIR/cpXYZ (compiled)
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
LOCK = HERE / "wheels.lock"
WHEELS = HERE.parent / "build" / "packages" / "wheels"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# RHEL 9 has the oldest glibc of the distributions that we serve: 2.34.
PLATFORMS = (
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "any",
)


def pip_download(python: str, to: Path, *what: str) -> None:
    """Put the wheels of `what` for a CPython into `to`, unless they are there already."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(to)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *what], check=True)


def wanted() -> list[str]:
    """Returns the pins of setup.cfg."""
    command = [sys.executable, str(HERE / "requirements.py"), "install"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def pin_of(wheel: Path) -> str:
    """Returns `name==version` from a wheel's file name, with the name as setup.cfg writes it."""
    name, version = wheel.name.split("-")[:2]
    return f"{name.replace('_', '-').lower()}=={version}"


def lock() -> None:
    """Resolve the pins for each CPython, and write down each chosen file."""
    pins: dict[str, set[str]] = {}
    for python in PYTHONS:
        with TemporaryDirectory() as scratch:
            pip_download(python, Path(scratch), *wanted())
            for wheel in Path(scratch).glob("*.whl"):
                digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
                pins.setdefault(pin_of(wheel), set()).add(f"--hash=sha256:{digest}")
    lines = [" \\\n    ".join([pin, *sorted(hashes)]) for pin, hashes in sorted(pins.items())]
    header = "# Made by `packaging/vendor.py lock` from setup.cfg. Do not edit.\n"
    LOCK.write_text(header + "\n".join(lines) + "\n")


def refuse_stale_lock() -> None:
    """Exit when setup.cfg asks for a wheel that the lock does not pin."""
    locked = {line.split()[0] for line in LOCK.read_text().splitlines() if "==" in line}
    if missing := sorted(set(wanted()) - locked):
        sys.exit(f"{LOCK.name} lacks {', '.join(missing)}: run `packaging/vendor.py lock`")


def directory_of(wheel: Path, python: str) -> str:
    """Returns a wheel's directory: a pure wheel and an abi3 wheel serve every CPython."""
    abi = wheel.stem.split("-")[-2]
    return "pure" if abi in ("none", "abi3") else f"cp{python.replace('.', '')}"


def unpack(wheel: Path, to: Path) -> None:
    """Unpack the importable files of a wheel, without its console scripts and headers."""
    with zipfile.ZipFile(wheel) as archive:
        data = f"{'-'.join(wheel.name.split('-')[:2])}.data/"
        archive.extractall(to, [name for name in archive.namelist() if not name.startswith(data)])


def tree(to: Path) -> None:
    """Make the vendor tree at `to`. Leaves a tree of the same lock as it is."""
    refuse_stale_lock()
    key = hashlib.sha256(LOCK.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = to.with_name(f"{to.name}.key")
    if stamp.exists() and stamp.read_text() == key:
        return
    stamp.unlink(missing_ok=True)
    rmtree(to, ignore_errors=True)
    for python in PYTHONS:
        wheels = WHEELS / python
        rmtree(wheels, ignore_errors=True)
        pip_download(python, wheels, "--no-deps", "--require-hashes", "-r", str(LOCK))
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, to / directory_of(wheel, python))
    stamp.write_text(key)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lock"]:
            lock()
        case ["tree", directory]:
            tree(Path(directory))
        case _:
            sys.exit(__doc__)
