"""The root file system's modules import next to nothing into the swap path."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "asyncio",
    "dataclasses",
    "logging",
    "pathlib",
    "subprocess",
    "tempfile",
    "typing",
    "shutil",
}


@pytest.mark.parametrize(
    "module",
    ["shim.rootfs.overlay", "shim.shm.fill", "shim.kernel.mounts", "shim.kernel.namespaces"],
)
def test_swap_path_stays_lean(module: str) -> None:
    code = f"import sys; sys.path.insert(0, '.'); import {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-ISE", "-c", code], text=True).split()
    assert HEAVY.isdisjoint(loaded)
