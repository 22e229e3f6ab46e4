"""Build the packages from nfpm.yaml: `build.py [deb] [rpm]`, both by default.

Stages the files of /usr/lib/quickthaw under build/packages/root and runs nfpm, unless the existing
packages were made from the same bytes. packaging/vendor.py makes the vendor tree.
"""

import configparser
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile, rmtree

TOP = Path(__file__).parent.parent
OUT = TOP / "build" / "packages"
ROOT = OUT / "root"
LIBRARY = OUT / "libquickthaw-gpu.so"
NFPM = Path(sys.executable).with_name("nfpm")
KINDS = {"deb": "quickthaw_{version}_amd64.deb", "rpm": "quickthaw-{version}-1.x86_64.rpm"}
NOT_SHIPPED = {"protos/generate.py"}
# Neither the clock nor the checkout's age belongs in a package: equal sources, equal bytes.
EPOCH = 1_700_000_000


def version() -> str:
    """Returns the version in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg")
    return config["metadata"]["version"]


def staged() -> Iterator[tuple[Path, str, int]]:
    """Yields the files under the prefix: source, place relative to the prefix, mode."""
    for package in ("shim", "hook", "protos"):
        for source in sorted((TOP / package).rglob("*.py")):
            place = str(source.relative_to(TOP))
            if place not in NOT_SHIPPED:
                yield source, place, 0o644
    launchers = TOP / "packaging" / "launchers"
    yield launchers / "front", "front.py", 0o644
    yield launchers / "hook", "hook.py", 0o644
    for program in ("quickthaw", "quickthawd"):
        yield launchers / program, f"bin/{program}", 0o755
    yield TOP / "shim" / "front" / "quickthaw-runc", "bin/quickthaw-runc", 0o755
    yield TOP / "hook" / "quickthaw-hook", "bin/quickthaw-hook", 0o755
    yield TOP / "hook" / "quickthaw-opened", "bin/quickthaw-opened", 0o755
    yield LIBRARY, f"gpu/{LIBRARY.name}", 0o644


def stage() -> None:
    """Copy our own files for the packages to ROOT, and set the times of all packed files."""
    made = ["make", "-s", "-C", str(TOP / "gpu"), f"OUT={LIBRARY.parent}"]
    subprocess.run(made, check=True)
    rmtree(ROOT, ignore_errors=True)
    for source, place, mode in staged():
        target = ROOT / place
        target.parent.mkdir(parents=True, exist_ok=True)
        copyfile(source, target)
        target.chmod(mode)
    for path in [*ROOT.rglob("*"), *(OUT / "vendor").rglob("*")]:
        os.utime(path, (EPOCH, EPOCH))


def key() -> str:
    """Returns a digest of everything that goes into the packages."""
    digest = hashlib.sha256(f"{version()} {EPOCH}".encode())
    digest.update((OUT / "vendor.key").read_bytes())
    inputs = [path for path in (TOP / "packaging").rglob("*") if path.is_file()]
    inputs += [path for path in ROOT.rglob("*") if path.is_file()]
    for path in sorted([*inputs, TOP / "nfpm.yaml", TOP / "README.md", TOP / "LICENSE"]):
        if path.exists() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(TOP)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def package(kind: str, part: Path) -> subprocess.Popen[bytes]:
    """Start nfpm for a kind of package."""
    environment = {**os.environ, "VERSION": version(), "SOURCE_DATE_EPOCH": str(EPOCH)}
    command = [str(NFPM), "package", "-f", "nfpm.yaml", "-p", kind, "-t", str(part)]
    return subprocess.Popen(command, cwd=TOP, env=environment, stdout=subprocess.DEVNULL)


def main(kinds: list[str]) -> int:
    stage()
    now = key()
    running = []
    for kind in kinds:
        target = OUT / KINDS[kind].format(version=version())
        stamp = OUT / f"{kind}.key"
        if not (target.exists() and stamp.exists() and stamp.read_text() == now):
            stamp.unlink(missing_ok=True)
            part = target.with_name(f"{target.name}.part")
            running.append((package(kind, part), part, target, stamp))
    statuses = [process.wait() for process, *_ in running]
    if any(statuses):
        return 1
    for _, part, target, stamp in running:
        part.replace(target)
        stamp.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(KINDS)))
