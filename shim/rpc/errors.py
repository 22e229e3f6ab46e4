"""The errors of a connection. None of these says anything about a pod.

RpcError
|-- ProtocolViolated        the peer sent bytes that the protocol forbids: close the connection
|   |-- MuxViolated
|   `-- TtrpcViolated
|-- ConnectionLost          the peer went away, or we closed
|   `-- PeerTooFast         we closed because the peer outran our limits
|-- CallTooLate             the peer did not answer our call in time
`-- CallRefused             the peer answered our call with a status other than OK
"""

from enum import IntEnum


class Code(IntEnum):
    """gRPC's status codes, which ttrpc uses. A code that gRPC does not know stays a plain int."""

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
    """The common base: `except RpcError` catches everything that a peer can cause."""


class ProtocolViolated(RpcError):
    """The peer sent bytes that the protocol forbids. The rest of the connection has no meaning."""


class MuxViolated(ProtocolViolated):
    """A frame of the multiplexing layer cannot be right."""


class TtrpcViolated(ProtocolViolated):
    """A ttrpc frame cannot be right."""


class ConnectionLost(RpcError):
    """The connection is closed. The message says by which side and why."""


class PeerTooFast(ConnectionLost):
    """We closed because the peer sent calls, or left answers unread, beyond our limits."""


class CallTooLate(RpcError):
    """The peer did not answer a call in the given time. A later answer is dropped."""


class CallRefused(RpcError):
    """The peer answered a call with an error. `code` is a Code if gRPC knows the number."""

    def __init__(self, code: int, message: str) -> None:
        self.code = Code(code) if code in Code._value2member_map_ else code
        self.message = message
        name = self.code.name if isinstance(self.code, Code) else f"code {code}"
        super().__init__(f"{name}: {message}")
