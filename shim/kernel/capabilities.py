"""Maps capabilities to names. Lean. Source: capabilities(7), linux/capability.h."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_IN_ORDER = (
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID "
    "CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST "
    "CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO "
    "CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE "
    "CAP_SYS_RESOURCE CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE CAP_AUDIT_WRITE "
    "CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG CAP_WAKE_ALARM "
    "CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE"
)
NAMES = _IN_ORDER.split()
"""In the order of their numbers."""


def mask_of(names: Iterable[str]) -> int:
    """Returns the bits of these capabilities; an unknown name has no bit."""
    return sum(1 << NAMES.index(name) for name in {str(name).upper() for name in names}
               if name in NAMES)  # fmt: skip


def names_of(mask: int) -> list[str]:
    """Returns the names of the bits; a bit without a name appears as its number."""
    bits = (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
    return [NAMES[bit] if bit < len(NAMES) else str(bit) for bit in bits]
