"""Containers with GPUs: captured, restored, refused; with a stand-in for the CUDA driver."""

from collections.abc import Iterator

import pytest

from tests.node.gpus import checked, gpu_probe, gpus, in_use, uuid
from tests.node.node import Node
from tests.node.swapping import ask, captured, first_answer, is_restored, nothing_left, restored


@pytest.fixture(scope="module")
def gpu_node(swap_node: Node) -> Iterator[Node]:
    """A node with two GPUs."""
    with gpus(swap_node):
        yield swap_node


@pytest.fixture(autouse=True)
def _nothing_stays(gpu_node: Node) -> Iterator[None]:
    """Neither on the node nor on its GPUs."""
    with nothing_left(gpu_node):
        yield
    assert set(in_use(gpu_node).values()) == {0}


def test_a_gpu_comes_back_with_its_memory(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "simple"})
    taken = captured(gpu_node, spec)
    before = checked(taken.source)
    nonce = ask(taken.source, "/state")["nonce"]
    taken.source.remove(grace_s=0)
    replica = restored(gpu_node, spec)
    assert first_answer(replica)["nonce"] == nonce
    assert checked(replica)["processes"] == before["processes"]
    assert ask(replica, "/restored")["gpus"] == {uuid(0): uuid(0)}
    assert is_restored(replica.container())
