"""Nodes for the tests: a node per Debian suite and test session."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.node import base, images, swapping
from tests.node.gpus import gpus
from tests.node.images import File, ImageConfig
from tests.node.node import Node
from tests.workers import images as workers

PACKAGES = base.BUILD.parent / "packages"
SUITES = ("forky", "trixie")
SHELL_IMAGE = "quickthaw.test/shell:1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last log lines of a node's services to the report of a failure."""
    del call
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        nodes = [each for each in item.funcargs.values() if isinstance(each, Node)]
        for node in (each for each in nodes if each.pid > 0):  # a fixture may have ended the node
            report.sections.append((f"containerd on {node.suite}", node.containerd.service.tail()))
            report.sections.append((f"quickthawd on {node.suite}", node.journal()[-8000:]))
    return report


@pytest.fixture(scope="session", params=SUITES)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """Yields a node with containerd, without our package."""
    with Node(request.param) as node:
        node.start_containerd()
        yield node


@pytest.fixture(scope="session")
def deb() -> Path:
    """Returns our package, as `make packages` has built it."""
    built = sorted(PACKAGES.glob("*.deb"))
    assert len(built) == 1, f"{PACKAGES} has {built}: run `make packages`"
    return built[0]


@pytest.fixture(scope="session", params=SUITES)
def quickthaw_node(request: pytest.FixtureRequest, deb: Path) -> Iterator[Node]:
    """Yields a node with our package installed, containerd calling it and the daemon running."""
    with Node(request.param) as node:
        node.start_product(deb)
        yield node


@pytest.fixture(scope="session")
def shell_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an image with nothing but busybox, which is a shell by default."""
    busybox = (base.node_root("trixie") / "usr/bin/busybox").read_bytes()
    tools = ("sh", "cat", "echo", "id", "ls", "mount", "ps", "sleep", "wget")
    files = [File("/bin/busybox", busybox, 0o755)]
    files += [File(f"/bin/{tool}", link="busybox") for tool in tools]
    files += [File("/var/run", link="/run"), File("/run/.keep"), File("/tmp/.keep")]
    into = tmp_path_factory.mktemp("images") / "shell.tar"
    return images.write_image(SHELL_IMAGE, [files], ImageConfig(entrypoint=["/bin/sh"]), into)


@pytest.fixture
def shell_image(node: Node, shell_archive: Path) -> str:
    """Returns the name of an image with a shell, known to the node."""
    if SHELL_IMAGE not in node.cri.image_names():
        node.import_image(shell_archive)
    return SHELL_IMAGE


@pytest.fixture(scope="session")
def swap_node(quickthaw_node: Node) -> Node:
    """Returns a node with our package that knows the image of the probe worker."""
    if swapping.PROBE not in quickthaw_node.cri.image_names():
        quickthaw_node.import_image(workers.build("probe"))
    return quickthaw_node


@pytest.fixture(scope="module")
def gpu_node(swap_node: Node) -> Iterator[Node]:
    """A node with two GPUs."""
    with gpus(swap_node):
        yield swap_node


@pytest.fixture
def nothing_left(swap_node: Node) -> Iterator[None]:
    """Removes the test's pods after the test, which fails when anything else than snapshots stays.

    For a whole module: `pytestmark = pytest.mark.usefixtures("nothing_left")`.
    """
    with swapping.nothing_left(swap_node):
        yield
