"""A snapshot that no trusted key has signed gets no ticket, and the reason has the key and the
remedy.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from shim.daemon.tracked import State
from shim.store.listing import listed, shown
from shim.store.store import Store
from shim.trust import change, keyfile, signature, verdict
from shim.trust.verdict import Trust
from shim.workload.annotations import Wish
from tests.unit.daemon import test_decision as deciding
from tests.unit.daemon.test_decision import a_container, a_decider, a_manifest, decided
from tests.unit.trusting import TrustsAll, keys_in

if TYPE_CHECKING:
    from pathlib import Path

    from shim.contract.manifest import Manifest
    from shim.daemon.tracked import Tracked
    from shim.trust.keyfile import PrivateKey
    from shim.trust.keys import KeyDirectory

FOREIGN = keyfile.make()
tickets = deciding.tickets


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyDirectory:
    monkeypatch.setattr(verdict, "ONE_LOOK_S", -1)
    return keys_in(tmp_path / "keys")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(str(tmp_path / "store"))
    found.open()
    return found


def put(store: Store, key: PrivateKey | None, number: int = 0, **changes: Any) -> Manifest:
    """Puts a snapshot of the container's like on the disk, signed with `key`."""
    found = a_manifest(deciding.identity(store), number, **changes)
    deciding.put(store, found)
    if key is not None:
        signed = signature.sign(found, key).encode()
        (store.snapshots / found.id / "manifest.sig").write_bytes(signed)
    store.read_index()
    return found


def start(store: Store, keys: KeyDirectory, wanted: str = "auto") -> Tracked:
    trust = Trust(keys, store.signature_of)
    return decided(a_decider(store, trust=trust), a_container(Wish(restore=wanted)))


def test_a_signed_snapshot_becomes_a_ticket(
    store: Store, keys: KeyDirectory, tickets: Path
) -> None:
    put(store, keys.private())
    assert start(store, keys).state is State.RESTORING
    assert len(list(tickets.iterdir())) == 1


@pytest.mark.parametrize("wanted", ["auto", "warm", "id"])
@pytest.mark.parametrize("signer", ["nobody", "foreign", "revoked"])
def test_untrusted_snapshot_gets_no_ticket_by_any_request(
    store: Store, keys: KeyDirectory, tickets: Path, wanted: str, signer: str
) -> None:
    if signer == "revoked":
        change.trust(keys, FOREIGN.public.pem(), "node-7")
        change.revoke(keys, "node-7")
    found = put(store, None if signer == "nobody" else FOREIGN, name="warm")
    tracked = start(store, keys, f"sha256:{found.id}" if wanted == "id" else wanted)
    assert tracked.state is State.COLD
    assert "signature" in tracked.reason
    told = {"nobody": "not signed", "foreign": FOREIGN.public.id, "revoked": "revoked"}[signer]
    assert told in tracked.reason
    assert list(tickets.iterdir()) == []


def test_unsigned_snapshot_gets_a_ticket_without_the_verdict(
    store: Store, keys: KeyDirectory, tickets: Path
) -> None:
    """So the verdict refuses in the test above, and nothing else does."""
    put(store, None)
    trusting = a_decider(store, trust=TrustsAll())
    assert decided(trusting, a_container(Wish(restore="auto"))).state is State.RESTORING


def test_refusal_is_counted_under_its_name(store: Store, keys: KeyDirectory, tickets: Path) -> None:
    put(store, FOREIGN)
    trust = Trust(keys, store.signature_of)
    decider = a_decider(store, trust=trust)
    decided(decider, a_container(Wish(restore="auto")))
    counted = decider._reporter.metrics.counters()
    assert [name for name in counted if 'reason="signature"' in name]


def test_older_trusted_snapshot_is_used_and_the_newer_is_reported(
    store: Store, keys: KeyDirectory, tickets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = put(store, keys.private(), 1)
    newer = put(store, FOREIGN, 2)
    put(store, FOREIGN, 0)
    tracked = start(store, keys)
    assert tracked.snapshot == older.id
    told = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert [newer.id[:12] in line and FOREIGN.public.id in line for line in told] == [True]


def test_each_decision_uses_the_present_keys(
    store: Store, keys: KeyDirectory, tickets: Path
) -> None:
    put(store, FOREIGN)
    assert start(store, keys).state is State.COLD
    change.trust(keys, FOREIGN.public.pem(), "node-7")
    assert start(store, keys).state is State.RESTORING
    change.revoke(keys, "node-7")
    assert start(store, keys).state is State.COLD


def test_listings_name_the_signer(store: Store, keys: KeyDirectory) -> None:
    own, foreign = put(store, keys.private(), 1), put(store, FOREIGN, 0)
    trust = Trust(keys, store.signature_of)
    rows = {row["id"]: row for row in listed(store, {}, trust=trust)["snapshots"]}
    assert (rows[own.id]["state"], rows[own.id]["signature"]) == ("ready", "valid")
    assert (rows[foreign.id]["state"], rows[foreign.id]["signature"]) == (
        "untrusted", "unknown-key",
    )  # fmt: skip
    assert FOREIGN.public.id in rows[foreign.id]["reason"]
    told = shown(store, own, {}, trust=trust)["signature"]
    assert (told["state"], told["key"]) == ("valid", keys.private().public.id)


def p99(took_s: list[float]) -> float:
    """Returns the 99th percentile, in milliseconds."""
    return statistics.quantiles(took_s, n=100)[98] * 1000


def test_thousand_signatures_are_within_the_budget_of_a_decision(
    store: Store, tmp_path: Path, tickets: Path
) -> None:
    """Time of the processor, as in the test of the decision alone."""
    keys, identity = keys_in(tmp_path / "keys"), deciding.identity(store)
    own = keys.private()
    for number in range(1000):
        put_in_memory(store, a_manifest(identity, number, key=f"{number % 500:064x}"), own)
    match = put_in_memory(store, a_manifest(identity, 1000), own)
    trust = Trust(keys, store.signature_of)
    began = time.process_time()
    assert all(trust.verdict(each).trusted for each in store.all())
    first_s = time.process_time() - began
    decider = a_decider(store, trust=trust)

    async def decisions() -> list[float]:
        took = []
        for _ in range(200):
            tracked, began = a_container(Wish(snapshot="auto")), time.process_time()
            await decider.decide(tracked)
            took.append(time.process_time() - began)
            assert tracked.snapshot == match.id
        return took

    took = asyncio.run(decisions())
    median_ms = statistics.median(took) * 1000
    print(f"verified in {first_s:.3f} s; decision {median_ms:.2f} ms, p99 {p99(took):.2f} ms")
    assert first_s < 2, "the start of the daemon waits for it"
    assert p99(took) < deciding.BUDGET_MS


def test_thousand_verdicts_read_the_keys_once(store: Store, tmp_path: Path) -> None:
    keys, identity = keys_in(tmp_path / "keys"), deciding.identity(store)
    own = keys.private()
    found = [put_in_memory(store, a_manifest(identity, number), own) for number in range(1000)]
    trust = Trust(keys, store.signature_of)
    took = []
    for turn in range(51):
        began = time.process_time()
        assert all(trust.verdict(each).trusted for each in found)
        if turn:  # the first verdict verifies
            took.append(time.process_time() - began)
    print(f"1000 verdicts {statistics.median(took) * 1000:.2f} ms, p99 {p99(took):.2f} ms")
    assert p99(took) < deciding.BUDGET_MS


def put_in_memory(store: Store, found: Manifest, key: PrivateKey) -> Manifest:
    store._by_id[found.id] = found
    store._signatures[found.id] = signature.sign(found, key).encode()
    return found
