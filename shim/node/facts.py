"""Learns the node's facts for the gate: CPU, kernel, CRIU, GPUs, and trusted keys."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim.contract import jsontext
from shim.gate.host import host_facts
from shim.gate.request import Node
from shim.kernel import nvml
from shim.node import tool

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest
    from shim.trust.verdict import Trust

log = logging.getLogger("quickthawd")

_TOOL_S = 10.0
_GPUS_S = 20.0


class NodeFacts:
    """The node as of the start; without its GPUs after a change of their driver."""

    def __init__(self, node: Node, driver: str) -> None:
        self._node, self._driver = node, driver

    @property
    def node(self) -> Node:
        """The facts that a decision may rely on now."""
        if _driver() != self._driver:
            log.warning("the GPU driver was changed: start quickthawd again; GPU pods start cold")
            self._driver = _driver()
            self._node.gpus = None
        return self._node


async def learn(criu: str, trust: Trust) -> NodeFacts:
    """Ask CPU, kernel, CRIU and GPU driver. Facts without answer are unknown: pods start cold."""

    def verdict(found: Manifest) -> tuple[str, bool]:
        told = trust.verdict(found)
        return str(told), told.trusted

    system, driver = os.uname(), _driver()
    try:
        host = host_facts()
    except OSError as error:
        log.warning("cannot read the features of the processor: %s; pods start cold", error)
        host = {}
    node = Node(
        arch=system.machine, kernel=system.release, criu=await criu_version(criu), host=host,
        gpus=await _gpus(), trust=verdict,
    )  # fmt: skip
    return NodeFacts(node, driver)


async def criu_version(criu: str) -> str:
    """Returns the version that CRIU prints (`Version: 4.2.1`), or the empty string."""
    try:
        ended = await tool.run_async([criu, "--version"], within_s=_TOOL_S)
    except (OSError, TimeoutError) as error:
        log.warning("cannot run %s: %s; pods start cold. Is CRIU installed?", criu, error)
        return ""
    return ended.tail.partition("\n")[0] if ended.status == 0 else ""


async def _gpus() -> dict[str, Any] | None:
    try:
        argv = [sys.executable, "-ISE", str(Path(nvml.__file__))]
        ended = await tool.run_async(argv, within_s=_GPUS_S)
        if ended.status:
            raise ValueError(ended.tail)
        found: dict[str, Any] = jsontext.parse(ended.output)
    except (OSError, TimeoutError, ValueError) as error:
        log.warning("cannot read the GPUs: %s; pods with GPUs start cold", error)
        return None
    return found


def _driver() -> str:
    try:
        with open(nvml.DRIVER) as file:
            return file.readline()
    except OSError:
        return ""
