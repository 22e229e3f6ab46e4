"""The code that a pod waits for imports almost nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"asyncio", "google", "grpc", "logging", "pyroute2", "subprocess", "pathlib", "typing",
         "dataclasses", "argparse", "rich", "prometheus_client", "shutil", "tempfile"}  # fmt: skip
LEAN = [
    "shim.front.main",
    "shim.restore.sequence",
    "shim.restore.forget",
    "shim.rootfs.overlay",
    "shim.shm.fill",
    "shim.network.plan",
    "shim.kernel.mounts",
    "shim.kernel.namespaces",
    "hook.__main__",
    "hook.prestart",
    "hook.poststop",
    "shim.workload.probe",
    "shim.integrity.check",
]


@pytest.mark.parametrize("module", LEAN)
def test_swap_path_stays_lean(module: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-ISE", "-c", code], text=True).split()
    assert HEAVY.isdisjoint(loaded), "every one of these is paid by the pod that waits"


BEFORE_THE_RUNTIME = ["shim.front.main", "shim.restore.guard", "shim.restore.sequence"]
BESIDE_IT = ["shim.contract.manifest", "shim.gate.decide", "shim.gate.request", "shim.restore.oom",
             "shim.integrity.check", "shim.shm.fill", "shim.network.readdress",
             "shim.network.plan", "shim.restore.memory", "shim.restore.resume"]  # fmt: skip


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (BEFORE_THE_RUNTIME, {"json", "re", "shutil", "hashlib", "socket", "shim.gate.checks"}),
        (BEFORE_THE_RUNTIME + BESIDE_IT, {"json", "re", "shutil", "hashlib", "shim.gate.key"}),
    ],
)
def test_modules_that_take_milliseconds_are_not_imported(
    modules: list[str], without: set[str]
) -> None:
    imports = "; ".join(f"import {module}" for module in modules)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {imports}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-ISE", "-c", code], text=True).split()
    assert without.isdisjoint(loaded)
