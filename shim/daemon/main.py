"""Runs quickthawd: signals, tasks, readiness, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from shim.capture.sequence import finished
from shim.contract import faults
from shim.contract.errors import KeyRefused, NoTurn, QuickthawError
from shim.contract.paths import (
    CONTAINERS,
    CONTROL,
    LOGS,
    OUTCOMES,
    RUN,
    SWAPPED,
    TICKETS,
    TURNS,
    VERIFIED,
)
from shim.daemon import config as configuration
from shim.daemon import control
from shim.daemon.captures import Captures
from shim.daemon.containerd import Containerd
from shim.daemon.decision import Decider
from shim.daemon.explain import Explaining
from shim.daemon.failures import OutcomeCounter
from shim.daemon.notify import notify
from shim.daemon.oneline import OneLine
from shim.daemon.plugin import NodePlugin
from shim.daemon.prefetch import Prefetch
from shim.daemon.registry import Registry
from shim.daemon.requests import Requests
from shim.daemon.reverify import forget_gone, reverify
from shim.daemon.watch import SlowSteps, gauges, watched
from shim.kernel import stopping
from shim.node import facts, kerndat
from shim.nri import session
from shim.report.reporter import Reporter
from shim.restore import turns
from shim.source.source import thaw_left
from shim.store.store import Store
from shim.trust import change
from shim.trust.keys import KeyDirectory
from shim.trust.verdict import Trust

if TYPE_CHECKING:
    from shim.daemon.config import Config

log = logging.getLogger("quickthawd")

_QUEUE_S = 1.0
_SHORT_THREADS, _THREADS_OF_CAPTURE = 8, 2
"""A capture occupies a thread, and the capture before it may still be removing its staging."""


class ToldToEnd(Exception):
    """A signal told the daemon to end."""


def main() -> int:
    """Run until SIGTERM. Returns an exit status."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    try:
        loaded = configuration.load()
        logging.getLogger().setLevel(loaded.config.log_level.upper())
        for warning in loaded.warnings:
            log.warning("%s", warning)
        _arm_faults()
        _recover()
        keys = KeyDirectory()
        _own_key(keys)
        store = Store(sign=keys.sign, marks_directory=VERIFIED, logs_directory=LOGS)
        store.open()
        forget_gone(store)
        store.forget_logs()
        watch = SlowSteps()
        with asyncio.Runner(loop_factory=lambda: watched(watch)) as runner:
            runner.run(_serve(loaded.config, store, _trust(keys, store), watch))
    except QuickthawError as error:
        log.error("%s", error)
        return error.exit_code
    except (OSError, ExceptionGroup) as error:
        log.error(
            "cannot start: %s; pods start cold. Remove the cause and start quickthawd again.", error
        )
        return 1
    return 0


def _arm_faults() -> None:
    """Arm the faults that a person asked for, and log each: this daemon never fails silently."""
    wrong = faults.arm(os.environ[faults.VARIABLE]) if faults.VARIABLE in os.environ else []
    for line in wrong + faults.arm_from_file() + faults.armed():
        log.warning("%s", line)


def _recover() -> None:
    """Make our directories, and clean up after a killed daemon or a killed swap."""
    for directory in (
        RUN, TICKETS, SWAPPED, CONTAINERS, CONTROL, OUTCOMES, LOGS, VERIFIED, TURNS,
    ):  # fmt: skip
        os.makedirs(directory, 0o700, exist_ok=True)
    with contextlib.suppress(NoTurn):  # an arriving restore removes the dead files itself
        turns.sweep(until=time.monotonic() + _QUEUE_S)
    for container in os.listdir(CONTAINERS):
        try:
            thaw_left(container)
        except ValueError as error:
            log.error(
                "container %s: cannot read its journal, so quickthawd does not thaw it: %s",
                container,
                error,
            )


def _own_key(keys: KeyDirectory) -> None:
    """Make this node's key if there is none. Without a key, restores still work."""
    try:
        key, made = change.initialise(keys)
    except (KeyRefused, OSError) as error:
        log.error("no captures until this is mended: %s", error)
        return
    log.info("%s key of this node: %s", "new" if made else "the", key.id)


def _trust(keys: KeyDirectory, store: Store) -> Trust:
    """Returns a Trust that has verified every signature once: a decision uses memory alone."""
    for problem in keys.current().problems:
        log.warning("keys: %s", problem)
    trust = Trust(keys, store.signature_of)
    for found in store.all():
        if not (verdict := trust.verdict(found)).trusted:
            log.warning("snapshot %s is not used: %s", found.id[:12], verdict)
    return trust


async def _serve(config: Config, store: Store, trust: Trust, watch: SlowSteps) -> None:
    registry, reporter = Registry(), Reporter()
    for name, about, value in gauges(watch):
        reporter.metrics.show(name, about, value)
    # Decisions have threads of their own, however many captures wait for a disk.
    threads = _SHORT_THREADS + _THREADS_OF_CAPTURE * config.max_captures_at_once
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "work"))
    containerd = Containerd(config.containerd_socket, config.containerd_namespace)
    node = await facts.learn(config.criu, trust)
    decider = Decider(config, store, trust, containerd, reporter, node)
    try:
        with (
            reporter.metrics.served(config.metrics_listen),
            reporter.telling_kubernetes(config.kubeconfig),
        ):
            await _run(config, store, trust, registry, reporter, decider, watch)
    except* ToldToEnd:
        log.info("stopping")
        notify("STOPPING=1")
    finally:
        await containerd.close()


async def _run(
    config: Config,
    store: Store,
    trust: Trust,
    registry: Registry,
    reporter: Reporter,
    decider: Decider,
    watch: SlowSteps,
) -> None:
    """Run all tasks of the daemon, until one raises Stopped."""
    async with asyncio.TaskGroup() as tasks:
        captures = Captures(config, store, trust, registry, decider, reporter, tasks)
        health = OutcomeCounter(
            store, reporter, after=config.quarantine_after,
            default_deadline_s=config.default_deadline_s,
        )  # fmt: skip
        prefetch = Prefetch(store)
        plugin = NodePlugin(registry, decider, captures, reporter, health, prefetch)
        requests = Requests(store, trust, registry, captures, reporter, watch)
        explaining = Explaining(store, registry, decider, captures)
        tasks.create_task(_until_told(), name="stop")
        tasks.create_task(health.serve(), name="health of snapshots")
        tasks.create_task(prefetch.serve(), name="prefetch")
        tasks.create_task(reverify(store), name="verify snapshots")
        tasks.create_task(kerndat.learn(config.criu), name="criu check")
        tasks.create_task(
            control.serve({**requests.verbs(), **explaining.verbs()}), name="control socket"
        )
        tasks.create_task(
            session.serve(
                plugin, socket=config.nri_socket, name=config.nri_plugin_name,
                index=config.nri_plugin_index, on_state=requests.nri,
            ),
            name="nri",
        )  # fmt: skip
        await asyncio.sleep(0)  # each task has run to its first wait: the sockets exist
        notify("READY=1")
        log.info("serving, %d snapshots", len(store.all()))
        tasks.create_task(_emptied(store), name="left in staging")


async def _emptied(store: Store) -> None:
    """Remove the staging of a killed daemon's captures: pods do not wait for that."""
    stop = stopping.Stop()
    try:
        await finished(asyncio.to_thread(store.empty_leaving, stop), stop)
    except (OSError, stopping.Stopped) as error:
        log.warning("cannot empty staging; the next start of quickthawd tries again: %s", error)


async def _until_told() -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()
    raise ToldToEnd
