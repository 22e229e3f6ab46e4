"""What can go wrong on a connection. None of these says anything about a pod.

RpcError
|-- ProtocolViolated        the peer sent what the protocol forbids; the connection is of no use
|   |-- MuxViolated
|   `-- TtrpcViolated
|-- ConnectionLost          the peer went away, or we closed
|   `-- PeerTooFast         it was closed because the peer outran one of our limits
|-- CallTooLate             our call was not answered in time
`-- CallRefused             our call was answered with a status other than OK
"""

from enum import IntEnum


class Code(IntEnum):
    """gRPC's status codes, which ttrpc uses. A peer may send others: then it is a plain int."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class RpcError(Exception):
    """The common base: whoever catches it has caught everything that a peer can cause."""


class ProtocolViolated(RpcError):
    """The peer sent what the protocol forbids. What follows on the connection has no meaning."""


class MuxViolated(ProtocolViolated):
    """A frame of the multiplexing layer cannot be right."""


class TtrpcViolated(ProtocolViolated):
    """A ttrpc frame cannot be right."""


class ConnectionLost(RpcError):
    """The connection is closed. The message says by whom and why."""


class PeerTooFast(ConnectionLost):
    """We closed because the peer sent calls, or left answers unread, beyond our limits."""


class CallTooLate(RpcError):
    """A call was not answered in the time that it was given. Its answer, if any, is dropped."""


class CallRefused(RpcError):
    """A call was answered with an error. `code` is a Code where gRPC knows it."""

    def __init__(self, code: int, message: str) -> None:
        self.code = Code(code) if code in Code._value2member_map_ else code
        self.message = message
        name = self.code.name if isinstance(self.code, Code) else f"code {code}"
        super().__init__(f"{name}: {message}")
