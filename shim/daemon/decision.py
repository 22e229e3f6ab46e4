"""Decides which snapshot a container starts from, if any, when its whole spec is known.

That is after CreateContainer and before StartContainer: containerd waits for the answer to
PostCreateContainer, and kubelet for containerd. All data are in memory, but for two calls of
containerd.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from shim.contract import faults, ticket
from shim.contract.errors import NoSuchSnapshot
from shim.contract.names import is_snapshot_id
from shim.daemon import content
from shim.daemon.containerd import ContainerdRefused
from shim.daemon.tracked import Identity, State, Tracked
from shim.gate import decide as gate
from shim.gate import gpu
from shim.gate.request import request_of
from shim.report.records import PassedOver, StartsCold, StartsRestored
from shim.store.listing import told
from shim.trust.verdict import REASON as SIGNATURE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.contract.manifest import Manifest
    from shim.daemon.config import Config
    from shim.daemon.containerd import Containerd, ContainerRecord
    from shim.node.facts import NodeFacts
    from shim.report.reporter import Reporter
    from shim.store.store import Store
    from shim.trust.verdict import Trust, Verdict

    _Untrusted = tuple[Manifest, Verdict]

log = logging.getLogger(__name__)


_EXPECTED = ("NoSnapshot", "Restart")
"""Reasons for a cold start that surprise nobody: the pod asked for that cold start."""
_TOLD_AT_MOST = 3


_COMMAND_ARGS, _COMMAND_CHARS = 256, 1024


def _command(args: object) -> tuple[str, ...]:
    """Returns the command for people, in `quickthaw show`: the gate compares the fact `args`."""
    found = args if isinstance(args, list) else []
    shown = [f"{arg!s:.{_COMMAND_CHARS}}" for arg in found[:_COMMAND_ARGS]]
    return (*shown, "…") if len(found) > _COMMAND_ARGS else tuple(shown)


def _told(untrusted: list[_Untrusted]) -> list[str]:
    found = [
        f"snapshot {each.id[:12]} is not used, {SIGNATURE}: {verdict}"
        for each, verdict in untrusted[:_TOLD_AT_MOST]
    ]
    more = len(untrusted) - len(found)
    return [*found, f"and {more} more like it"] if more else found


class Decider:
    """Gives a container its ticket, or the reason why it gets no ticket."""

    def __init__(
        self,
        config: Config,
        store: Store,
        trust: Trust,
        containerd: Containerd,
        reporter: Reporter,
        node: NodeFacts,
    ) -> None:
        self._config, self._store, self._trust, self._node = config, store, trust, node
        self._containerd, self._reporter = containerd, reporter

    async def decide(self, tracked: Tracked) -> None:
        """Write the ticket of `tracked`, or report why not. Never fails the container."""
        faults.point("daemon.decide", tracked.container)
        try:
            tracked.identity = await self.identify(tracked)
        except (ContainerdRefused, ValueError) as error:
            self._cold(tracked, "Unknown", f"its spec cannot be read: {error}")
            return
        if tracked.restarts and tracked.wish.on_restart == "cold":
            self._cold(tracked, "Restart", "kubelet restarts it (quickthaw.io/on-restart)")
            return
        self._match(tracked, tracked.identity)

    async def later_ones(self, tracked: Tracked) -> list[str]:
        """Returns later containers of the pod: see Containerd. Raises ContainerdRefused."""
        return await self._containerd.later_ones(tracked.container)

    async def identify(self, tracked: Tracked) -> Identity:
        """Returns the container's identity. Raises ContainerdRefused, ValueError."""
        if not tracked.pod.addresses:
            addresses = await self._containerd.addresses(tracked.pod.sandbox)
            tracked.pod = replace(tracked.pod, addresses=addresses)
        record = await self._containerd.record(tracked.container)
        held = await content.at_creation(tracked, record.spec)
        # In a thread: the pod's author has chosen the length of the spec.
        return await asyncio.to_thread(self._identity, tracked, record, held)

    def _identity(self, tracked: Tracked, record: ContainerRecord, held: str | None) -> Identity:
        request = request_of(
            record.spec, content.pod_of(tracked), self._node.node,
            image_digest=record.image_digest, ignore_env=self._config.ignore_env,
            any_namespace=self._config.cross_namespace, volume_content=held,
        )  # fmt: skip
        request.any_volume_content = tracked.wish.volume_content == "ignore"
        command = _command(record.spec.process.get("args"))
        gpus = gpu.chosen(record.spec, self._node.node.gpus) or ()
        return Identity(request, record.image, record.image_digest, record.log_path, command, gpus)

    def candidates(self, tracked: Tracked, identity: Identity) -> list[Manifest]:
        """Returns the snapshots that the pod's annotation can mean. Raises NoSuchSnapshot.

        Snapshots of another namespace do not exist for the pod: nothing of them is looked at, and
        no answer may depend on them.
        """
        wanted = tracked.wish.restore or tracked.wish.snapshot
        namespace = "" if self._config.cross_namespace else tracked.pod.namespace
        if wanted == "auto":
            return self._store.find(namespace=namespace, key=identity.key)
        if wanted.startswith("sha256:") or is_snapshot_id(wanted):
            return [self._store.get(wanted, namespace=namespace)]
        return self._store.find(namespace=namespace, name=wanted)

    def _match(self, tracked: Tracked, identity: Identity) -> None:
        try:
            candidates, untrusted = self._sorted(self.candidates(tracked, identity))
        except NoSuchSnapshot as error:
            self._cold(tracked, "NoSuchSnapshot", str(error))
            return
        usable = [each for each in candidates if not self._store.quarantine.get(each.id)]
        if candidates and not usable:
            self._quarantined(tracked, candidates[0])
            return
        match gate.decide(identity.request, usable):
            case gate.Match() as match:
                for each, verdict in untrusted:
                    if each.created_at >= match.manifest.created_at:
                        self._reporter.tell(_passed_over(tracked, each, verdict))
                self._restore(tracked, identity, match.manifest)
            case gate.Refused() as refused:
                why = "; ".join([str(refused), *_told(untrusted)])
                self._refuse(tracked, why, [*refused.codes, *([SIGNATURE] if untrusted else ())])
            case gate.NoSnapshot() if untrusted:
                self._refuse(tracked, "; ".join(_told(untrusted)), [SIGNATURE])
            case gate.NoSnapshot():
                wanted = tracked.wish.restore or tracked.wish.snapshot
                self._cold(tracked, "NoSnapshot", f"there is no snapshot {wanted!r} for it (yet)")
            case never:
                assert_never(never)

    def _sorted(self, candidates: list[Manifest]) -> tuple[list[Manifest], list[_Untrusted]]:
        """Returns the snapshots that a trusted key has signed, and the others, in the given order.

        The gate compares no untrusted manifest: nothing in such a manifest counts.
        """
        verdicts = [(each, self._trust.verdict(each)) for each in candidates]
        return (
            [each for each, verdict in verdicts if verdict.trusted],
            [(each, verdict) for each, verdict in verdicts if not verdict.trusted],
        )

    def _restore(self, tracked: Tracked, identity: Identity, found: Manifest) -> None:
        wish = tracked.wish
        faults.point("daemon.ticket", tracked.container)
        ticket.write(
            ticket.Ticket(
                container=tracked.container, snapshot=found.id, fallback=wish.fallback,
                deadline_s=self._deadline_s(tracked),
                turns=self._config.max_restores_at_once, turn_wait_s=self._config.restore_wait_s,
                turn_hold_s=self._config.restore_hold_s,
                pod_namespace=tracked.pod.namespace, pod_name=tracked.pod.name,
                pod_uid=tracked.pod.uid, container_name=tracked.name,
                resume=wish.resume.encode() if wish.resume else "",
                gpu_pairs=identity.gpu_pairs(found),
                others=tracked.others,
            )
        )  # fmt: skip
        faults.point("daemon.ticket.written", tracked.container)
        tracked.snapshot = found.id
        tracked.become(State.RESTORING)
        self._reporter.tell(StartsRestored(subject=tracked.subject, snapshot=found.id))

    def _deadline_s(self, tracked: Tracked) -> float:
        """Returns the pod's deadline or the default, capped: a restore holds what others need."""
        asked, most = tracked.wish.deadline_s, self._config.max_deadline_s
        if asked > most:
            log.warning(
                "%s/%s/%s: quickthaw.io/deadline asks for %g s, max_deadline_s allows %g s",
                tracked.pod.namespace, tracked.pod.name, tracked.name, asked, most,
            )  # fmt: skip
        return min(asked or self._config.default_deadline_s, most)

    def _refuse(self, tracked: Tracked, why: str, codes: Sequence[str]) -> None:
        self._cold(tracked, codes[0], why, codes)

    def _quarantined(self, tracked: Tracked, found: Manifest) -> None:
        """Start cold. `why` is about another pod: of any namespace, if cross_namespace is set."""
        record, short = self._store.quarantine.get(found.id), found.id[:12]
        begins = f"snapshot {short} is in quarantine"
        why = (
            f"{begins}: {told(record) if record else ''} Mend the cause and release it with "
            f"`quickthaw quarantine release {short}`, or remove it with `quickthaw rm`."
        )
        public = begins if self._config.cross_namespace else ""
        self._cold(tracked, "quarantine", why, public=public)

    def _cold(
        self, tracked: Tracked, reason: str, why: str, codes: Sequence[str] = (), public: str = ""
    ) -> None:
        tracked.become(State.COLD, why)
        is_named = tracked.wish.restore not in ("", "auto")
        self._reporter.tell(
            StartsCold(
                subject=tracked.subject, reason=reason, why=why, codes=tuple(codes), public=public,
                is_expected=reason in _EXPECTED and not (is_named and reason == "NoSnapshot"),
            )
        )  # fmt: skip


def _passed_over(tracked: Tracked, newer: Manifest, verdict: Verdict) -> PassedOver:
    return PassedOver(
        subject=tracked.subject, snapshot=newer.id, reason=verdict.state, why=str(verdict)
    )
