"""Question 5: the driver's restore on a process that CRIU restored, and what the helper costs."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from shim.kernel import procfs
from tests.gpu import children
from tests.gpu.children import Helper
from tests.gpu.container import Container
from tests.gpu.scene import Scene

STEPS = ("lock", "checkpoint", "restore", "unlock")


def fresh(scene: Scene, count: int = 3) -> list[dict[str, Any]]:
    """Helpers one after the other: milliseconds to start, load and initialise."""
    found = []
    for _ in range(count):
        with scene.helper() as helper:
            found.append(
                {
                    "start_ms": helper.start_ms,
                    "load_ms": helper.started.get("load_ms"),
                    "init_ms": helper.init.get("ms"),
                }
            )
    return found


def beside(scene: Scene) -> list[dict[str, Any]]:
    """The same while another process uses the device."""
    with scene.cuda("64"):
        return fresh(scene)


def without_init(scene: Scene) -> dict[str, Any]:
    """All four calls by a helper that never called cuInit."""
    with scene.cuda("512x2") as worker, scene.helper(init=False) as helper:
        found = {step: helper.do(step, worker.pid, timeout_ms=20_000) for step in STEPS}
        return {**found, "check": worker.check()}


def one_each(scene: Scene, *, init: bool) -> dict[str, Any]:
    """A new helper for every call: whole milliseconds, its start included."""
    found: dict[str, Any] = {}
    with scene.cuda("512x2") as worker:
        for step in STEPS:
            started = time.monotonic()
            with scene.helper(init=init) as helper:
                answer = helper.do(step, worker.pid, timeout_ms=20_000)
            found[step] = {**answer, "whole_ms": round((time.monotonic() - started) * 1000, 1)}
        return {**found, "check": worker.check()}


def kept(scene: Scene) -> dict[str, Any]:
    """The same calls by one helper that was there before."""
    with scene.helper() as helper, scene.cuda("512x2") as worker:
        found = {step: helper.do(step, worker.pid, timeout_ms=20_000) for step in STEPS}
        return {**found, "check": worker.check()}


def no_cuda(scene: Scene) -> dict[str, Any]:
    """Returns the answers of the calls for a process without CUDA, and for no process."""
    with scene.helper() as helper:
        us = helper.pid if scene.fake else 1
        return {
            "of init, state": helper.do("state", us),
            "of init, restore thread": helper.do("thread", us),
            "of no process, state": helper.do("state", 4_000_000),
            "of itself, state": helper.do("state", helper.pid),
        }


def contained(scene: Scene, argv: Callable[[], list[str]], name: str) -> dict[str, Any]:
    """runc checkpoint and restore of a container with the worker; driver calls from outside."""
    container = Container(scene.bundle, scene.scratch, name)
    try:
        with scene.helper() as helper:
            return trip(scene, container, helper, argv())
    finally:
        container.end()


def trip(scene: Scene, container: Container, helper: Helper, argv: list[str]) -> dict[str, Any]:
    """Start, freeze, checkpoint, restore, thaw, check."""
    put = partial(scene.record.put)
    name = container.name
    worker = container.start(argv, timeout_s=90)
    put(f"{name}: pids", [str(number) for number in procfs.numbers(worker.pid)])
    put(f"{name}: memory before", container.memory())
    put(f"{name}: frozen", helper.freeze(worker.pid))
    put(f"{name}: memory when checkpointed", container.memory())
    put(f"{name}: runc checkpoint", container.checkpoint())
    finding, again = container.restore(worker)
    put(f"{name}: runc restore", finding)
    if finding["ok"]:
        put(f"{name}: state", helper.state(again.pid))
        put(f"{name}: memory when restored", container.memory())
        put(f"{name}: thawed", helper.thaw(again.pid))
        put(f"{name}: memory then", container.memory())
        put(f"{name}: check", again.check())
    return {"restored": finding["ok"]}


@contextmanager
def own_network() -> Iterator[str]:
    """A network namespace's file, with nothing in it, while a process keeps it."""
    with children.background(["unshare", "-n", "sleep", "300"]) as keeper:
        path, ours = f"/proc/{keeper.pid}/ns/net", os.readlink("/proc/self/ns/net")
        until = time.monotonic() + 5
        while os.readlink(path) == ours and time.monotonic() < until:
            time.sleep(children.POLL_S)
        try:
            yield path
        finally:
            keeper.kill()


def two_networks(scene: Scene) -> dict[str, Any]:
    """As two containers of different pods are."""
    with own_network() as one, own_network() as two:
        return two_of_one(scene, (one, two))


def two_of_one(scene: Scene, networks: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """A second container from the images of one that goes on; both on one device."""
    kind = "apart" if networks[0] else "together"
    first = Container(scene.bundle, scene.scratch, f"first-{kind}", network=networks[0])
    second: Container | None = None
    try:
        with scene.helper() as helper:
            worker = first.start(scene.cuda_argv("512x2"), timeout_s=60)
            found: dict[str, Any] = {"frozen": helper.freeze(worker.pid)["state"]}
            found["checkpoint"] = first.checkpoint("--leave-running")
            second = first.clone(f"second-{kind}", networks[1])
            asleep = worker.restored(worker.pid)
            found["source"] = {**helper.thaw(worker.pid), "check": worker.check()}
            found["restore"], again = second.restore(asleep)
            if found["restore"]["ok"]:
                found["second"] = {**helper.thaw(again.pid), "check": again.check()}
                found["source still"] = worker.check()
            return found
    finally:
        for each in (first, second):
            if each is not None:
                each.end()


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """`only`: which of the steps."""
    steps: dict[str, Callable[[], Any]] = {
        "cuInit, nobody else": partial(fresh, scene),
        "cuInit, another process there": partial(beside, scene),
        "helper without cuInit": partial(without_init, scene),
        "a helper for each call": partial(one_each, scene, init=True),
        "a helper for each call, no cuInit": partial(one_each, scene, init=False),
        "one helper for all": partial(kept, scene),
        "other processes": partial(no_cuda, scene),
        "container cuda": lambda: contained(scene, partial(scene.cuda_argv, "512x2"), "cuda"),
        "two of one": partial(two_of_one, scene),
        "two of one, networks of their own": partial(two_networks, scene),
        "container torch": lambda: contained(scene, partial(scene.torch_argv, "512x2"), "torch"),
    }
    for name, work in steps.items():
        if scene.wanted(name, only):
            scene.step(name, work)
