"""Rules for every test: a skip is a failure in CI, and nothing stays on this machine."""

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.node.inventory import take_host

# The time of an example depends more on other work of the machine than on our code.
settings.register_profile("quickthaw", deadline=None)
settings.load_profile("quickthaw")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns a skip into a failure in CI: locally a machine may lack the needs of a test, CI may
    not.
    """
    del item, call
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: Any) -> str:
    return str(longrepr[-1] if isinstance(longrepr, tuple) else longrepr)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_on_this_machine() -> Iterator[None]:
    """Checks after the last node that no mount, cgroup, link, process or file of any node is left.

    Set up before every other fixture of the session, so torn down after all of them.
    """
    before = take_host(os.getpid())
    yield
    after = take_host(os.getpid())
    assert (after.processes, after.cgroups, after.runs) == ((), (), ())
    assert set(after.mounts) <= set(before.mounts)
    assert set(after.links) <= set(before.links)
