"""The GPU probe runs to its end without a GPU: a stand-in plays the driver, all else is real."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.gpu.bundle import BUNDLE, ROOT
from tests.gpu.record import read
from tests.node.enclosure import Enclosure

STEPS = (
    ("facts", "criu", "runc, CPU container", "process_madvise"),
    ("cuda 1 GiB", "cuda 1 GiB hollow", "cuda 1 GiB lazy", "8 GiB", "spoilt"),
    ("helper without cuInit", "container cuda"),
    ("wrong order", "killed in each state", "two processes", "NVML"),
)
"""The parts that report something without a GPU."""


@pytest.mark.timeout(600)
def test_every_part_ends_and_processes_that_criu_restored_are_right() -> None:
    subprocess.run([sys.executable, "-m", "tests.gpu.bundle"], cwd=ROOT, check=True)
    with Enclosure("forky") as node:
        shutil.copytree(BUNDLE, node.path("/bundle"))
        environment = {"PYTHONPATH": "/bundle", "PYTHONDONTWRITEBYTECODE": "1"}
        words = ["--bundle", "/bundle", "--out", "/out", "--fake"]
        words += ["--only", ";".join(name for part in STEPS for name in part)]
        said = node.call(
            ["python3", "-m", "tests.gpu.probe", *words], timeout_s=560, environment=environment
        )
        facts = read(node.path("/out/facts.json"))
    shown = f"{said.stdout}\n{said.stderr}"
    ends = {part: findings.get("ended", {}).get("rc") for part, findings in facts.items()}
    assert list(ends.values()) == [0] * 8, f"a part did not end well: {ends}\n{shown}"
    images = facts["part 4"]
    for name in ("cuda 1 GiB", "cuda 1 GiB hollow", "cuda 1 GiB lazy"):
        found = images.get(f"{name}: restored: check")
        assert found == {"ok": True}, f"{name} came back with another payload: {found}\n{shown}"
    spoilt = facts["part 3"]["spoilt end"]["check"]
    assert spoilt == {"ok": False}, "a changed staging area went unseen: the check checks nothing"
    container = facts["part 5"]["container cuda"]
    assert container == {"restored": True}, json.dumps(facts["part 5"], indent=1)
