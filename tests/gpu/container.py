"""runc from the bundle: a container of the machine's own files, checkpointed and restored."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from tests.gpu import children
from tests.gpu.children import ROOT, Worker
from tests.gpu.images import errors, sizes

TREES: Final = ("/usr", "/opt", "/etc")
LINKS: Final = ("/bin", "/sbin", "/lib", "/lib64")
CAPABILITIES: Final = ("CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID")


class Container:
    """One container; it has pid, mount, IPC and UTS namespaces of its own.

    By default it shares the host's network.

    Its root is made of bind mounts of the machine's system trees, which runc has CRIU treat as
    external. The worker's directory is at the same path inside.
    """

    def __init__(
        self,
        bundle: Path,
        scratch: Path,
        name: str,
        *,
        network: str = "",
        memory_bytes: int = 0,
    ) -> None:
        """`network`: a network namespace's file, none for the host's. No memory limit is 0."""
        self._network, self._memory_bytes = network, memory_bytes
        self.name, self.home = f"gpu-probe-{name}", scratch / f"home-{name}"
        self.inside = self.home  # where the worker sees its home
        self._runc, self._state = str(bundle / "bin" / "runc"), str(scratch / "runc")
        self._path = f"{bundle / 'bin'}:{os.environ['PATH']}"
        self.directory, self._bundle = scratch / f"container-{name}", bundle
        for path in (self.home, self.directory / "rootfs", self.directory / "images"):
            path.mkdir(parents=True)

    def start(self, argv: list[str], *, timeout_s: float) -> Worker:
        """The worker in it, when it is ready. Raises RuntimeError."""
        words = [str(self.inside) if word == "HOME" else word for word in argv]
        (self.directory / "config.json").write_text(json.dumps(self.config(words)))
        pid = self.directory / "pid"
        done = self.runc("run", "-d", "--pid-file", str(pid), "--bundle", str(self.directory))
        if done.returncode:
            raise RuntimeError(f"runc run: {self.said(done)}")
        worker = Worker(self.home, int(pid.read_text()), None)
        worker.await_ready(timeout_s)
        return worker

    def checkpoint(self, *options: str) -> dict[str, Any]:
        """`runc checkpoint`; the container is gone then, unless the options say otherwise."""
        started = time.monotonic()
        images, work = self.directory / "images", self.directory / "work"
        places = ("--image-path", str(images), "--work-path", str(work))
        done = self.runc("checkpoint", *places, *options)
        return self.finding(done, started, work / "dump.log") | {"images": sizes(images)}

    def restore(self, worker: Worker) -> tuple[dict[str, Any], Worker]:
        """`runc restore`, and the worker again, by its pid here."""
        started = time.monotonic()
        images, work = self.directory / "images", self.directory / "work"
        pid = self.directory / "pid-restored"
        words = ["--pid-file", str(pid), "--bundle", str(self.directory), "-d"]
        done = self.runc("restore", *words, "--image-path", str(images), "--work-path", str(work))
        finding = self.finding(done, started, work / "restore.log")
        if done.returncode:
            return finding, worker
        return finding, worker.restored(int(pid.read_text()), self.home)

    def clone(self, name: str, network: str = "") -> "Container":
        """Another container to be restored from the same images, with a home of its own."""
        other = Container(self._bundle, self.directory.parent, name, network=network)
        other.inside = self.home
        shutil.rmtree(other.directory / "images")
        (other.directory / "images").symlink_to(self.directory / "images")
        shutil.copytree(self.home, other.home, dirs_exist_ok=True)
        (other.directory / "config.json").write_text(json.dumps(other.config(["nothing"])))
        return other

    def finding(self, done: Any, started: float, log: Path) -> dict[str, Any]:
        took = round(time.monotonic() - started, 3)
        found: dict[str, Any] = {"ok": done.returncode == 0, "s": took}
        return found if found["ok"] else found | {"said": self.said(done), "log": errors(log)}

    @staticmethod
    def said(done: Any) -> str:
        return str(done.stderr or done.stdout)[-500:]

    def runc(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Its output goes to files: what it leaves running would keep a pipe open."""
        log = self.directory / f"{verb}.log"
        argv = [self._runc, "--root", self._state, "--log", str(log), verb, *words, self.name]
        environment = {**children.environment(), "PATH": self._path}
        nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        nowhere |= {"stderr": subprocess.DEVNULL}
        done = children.run(argv, 60, capture_output=False, text=True, env=environment, **nowhere)
        done.stderr = done.stderr or (log.read_text() if log.exists() else "")
        return done

    def memory(self) -> dict[str, int]:
        """MiB that its cgroup is charged with, now and at most; nothing on cgroup v1."""
        found = {}
        for path in Path("/sys/fs/cgroup").glob(f"**/{self.name}/memory.[cp]*"):
            if path.name in ("memory.current", "memory.peak"):
                found[path.name] = int(path.read_text()) >> 20
        return found

    def end(self) -> None:
        """Killed, and its cgroup removed."""
        self.runc("delete", "--force")
        shutil.rmtree(self.directory, ignore_errors=True)

    def config(self, argv: list[str]) -> dict[str, Any]:
        """The OCI configuration."""
        inside = {"destination": "/proc", "type": "proc", "source": "proc"}
        sets = ("bounding", "effective", "permitted")
        namespaces = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]
        namespaces += [{"type": "network", "path": self._network}] if self._network else []
        resources: dict[str, Any] = {"devices": [{"allow": True, "access": "rwm"}]}
        if self._memory_bytes:
            resources["memory"] = {"limit": self._memory_bytes}
        # There may be no iptables to lock a network with; nothing is connected.
        (self.directory / "criu.conf").write_text("network-lock skip\n")
        keep = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "HOME", "PYTHONUNBUFFERED")
        known = {**children.environment(), "HOME": "/root"}
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": argv,
                "cwd": str(self.inside),
                "env": [f"{name}={known[name]}" for name in keep if name in known],
                "capabilities": {each: list(CAPABILITIES) for each in sets},
            },
            "root": {"path": "rootfs"},
            "hostname": "gpu-probe",
            "mounts": [inside, *self.mounts()],
            "linux": {
                "cgroupsPath": f"/{self.name}",
                "namespaces": namespaces,
                "resources": resources,
            },
            "annotations": {"org.criu.config": str(self.directory / "criu.conf")},
        }

    def mounts(self) -> list[dict[str, Any]]:
        """The system's trees and what is mounted in them, devices, and our own directories."""
        rootfs = self.directory / "rootfs"
        for link in LINKS:
            if Path(link).is_symlink():
                (rootfs / link[1:]).symlink_to(os.readlink(link))
        lines = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        below = [m for m in lines if any(m.startswith(f"{tree}/") for tree in TREES)]
        trees = [tree for tree in TREES if Path(tree).is_dir()]
        ours = [path for path in (str(ROOT), str(self._bundle)) if not path.startswith(TREES)]
        binds = [bind(path, "ro") for path in (*trees, *below, *dict.fromkeys(ours))]
        binds.append(bind(str(self.home), "rw", str(self.inside)))
        shm = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}
        dev = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}
        devices = [bind(str(path), "rw") for path in sorted(Path("/dev").glob("nvidia*"))]
        return [*binds, dev | {"options": ["nosuid", "mode=755"]}, shm, *devices]


def bind(path: str, mode: str, inside: str = "") -> dict[str, Any]:
    """At the same path inside, or at another."""
    to = inside or path
    return {"destination": to, "type": "bind", "source": path, "options": ["bind", mode]}
