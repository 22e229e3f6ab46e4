"""Decides whether a snapshot may be used: a trusted key must have signed its manifest.

Every decision asks, so the answers come from memory: a signature is verified once, and again after
the keys have changed. Decoding a manifest checks that the manifest and its id belong together, and
the swap checks that once more (docs/decisions/0006).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shim.contract.errors import KeyRefused, NotCapturable
from shim.trust import signature
from shim.trust.keys import Keyring

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.contract.manifest import Manifest
    from shim.trust.keys import KeyDirectory, KeyEntry

REASON: Final = "signature"
"""The name of a refusal for want of trust."""
VALID: Final = "valid"
ONE_LOOK_S = 0.001
"""A decision may ask about a thousand snapshots: a single look at the keys serves all. A program
that changes a key takes longer than this to end."""
_CACHED: Final = 4096
"""Verdicts that are kept: a few hundred bytes each. Snapshots come and go."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer about a signature.

    state: `valid`, `none`, `malformed`, `invalid`, `unknown-key`, `revoked` or `no-keys`. key,
    signer: id and name of the key, where they are known. why, do: the reason, and the operator's
    remedy; empty when the signature is valid.
    """

    state: str
    key: str = ""
    signer: str = ""
    why: str = ""
    do: str = ""

    @property
    def trusted(self) -> bool:
        """Whether the snapshot may be used."""
        return self.state == VALID

    def __str__(self) -> str:
        if self.trusted:
            return f"signed by {self.signer} ({self.key})"
        return f"{self.why}. {self.do}"

    def as_json(self) -> dict[str, Any]:
        """Returns the verdict for `quickthaw ls` and `show`."""
        return {
            "state": self.state, "key": self.key, "signer": self.signer, "why": self.why,
            "do": self.do,
        }  # fmt: skip


class Trust:
    """Gives verdicts over a store's snapshots. signature_of: id to the file's content, or b""."""

    def __init__(self, keys: KeyDirectory, signature_of: Callable[[str], bytes]) -> None:
        self._keys, self._signature_of = keys, signature_of
        self._ring, self._looked = Keyring(), float("-inf")
        self._verdicts: dict[str, tuple[bytes, Verdict]] = {}

    def verdict(self, found: Manifest) -> Verdict:
        """Returns whether this node may use the snapshot, by the keys as they are now."""
        if (now := time.monotonic()) - self._looked > ONE_LOOK_S:
            self._looked, ring = now, self._keys.current()
            if ring is not self._ring or len(self._verdicts) > _CACHED:
                self._ring, self._verdicts = ring, {}
        ring = self._ring
        data = self._signature_of(found.id)
        known = self._verdicts.get(found.id)
        if known is None or known[0] != data:
            known = self._verdicts[found.id] = data, judge(found, data, ring)
        return known[1]

    def check_signing(self, container: str) -> None:
        """Raises NotCapturable when a snapshot could not be signed: no node would use it."""
        try:
            self._keys.private()
        except KeyRefused as error:
            raise NotCapturable(
                "cannot capture", about=container,
                why=f"the snapshot could not be signed: {error.about}: {error.why}",
                do=error.do,
            ) from error  # fmt: skip


def judge(found: Manifest, data: bytes, ring: Keyring) -> Verdict:
    """Returns the verdict over a manifest whose signature file holds `data`. Pure."""
    if ring.broken:
        why = f"no key of this node can be trusted: {ring.broken}"
        return Verdict("no-keys", why=why, do="See `quickthaw keys ls`.")
    if not data:
        return Verdict("none", why="the snapshot is not signed", do=_REMOVE)
    try:
        signed = signature.decode(data)
    except ValueError as error:
        return Verdict(
            "malformed", why=f"the signature of the snapshot is malformed: {error}", do=_REMOVE
        )
    if revoked := ring.revocation(signed.key):
        return _of_revoked(signed.key, revoked)
    if (entry := ring.signer(signed.key)) is None:
        return _of_unknown(signed.key)
    if not signed.is_of(found, entry.key):
        why = f"key {entry.key.id} ({entry.name}) did not make its signature over this manifest"
        return Verdict("invalid", entry.key.id, entry.name, f"{why}: it was changed", _REMOVE)
    return Verdict(VALID, entry.key.id, entry.name)


_REMOVE: Final = "Remove it with `quickthaw rm`; the next pod makes a new snapshot."


def _of_revoked(key: str, revoked: KeyEntry) -> Verdict:
    why = f"it is signed by key {key} ({revoked.name}), which is revoked here by {revoked.file}"
    return Verdict("revoked", key, revoked.name, why, _REMOVE)


def _of_unknown(key: str) -> Verdict:
    do = (
        "If it comes from a node of yours, give that node's node.pub to `quickthaw keys trust`; "
        "else remove it with `quickthaw rm`."
    )
    why = f"it is signed by key {key}, which this node does not trust"
    return Verdict("unknown-key", key, "", why, do)
