"""What can go wrong on the client's side, as one small tree.

Prenet4dError
├── ProtocolError            a message breaks the wire protocol
│   ├── MalformedMessage     not a prenet4d message, or a field is missing or wrong
│   ├── UnsupportedVersion   a prenet4d message of a version this package does not speak
│   ├── UnknownType          a message type this version does not have
│   ├── PayloadMismatch      an array's bytes do not fit its dtype × shape
│   ├── OversizeMessage      larger than the receiver allows
│   └── MissingCodec         compressed with a codec that is not installed here
├── InvalidUse               a call that cannot be carried out; nothing was sent
├── NoAnswer                 nobody answered within the timeout
├── ConnectionRefused        the service refused or dropped a receiver, or is gone
└── CommandRefused           a control command was refused; the message says why
"""


class Prenet4dError(Exception):
    """Base of every error this package raises on purpose."""


class ProtocolError(Prenet4dError):
    """A message breaks the wire protocol."""


class MalformedMessage(ProtocolError):
    """Not a prenet4d message, or one with a missing or wrong field."""


class UnsupportedVersion(ProtocolError):
    """A prenet4d message of a version this package does not speak."""


class UnknownType(ProtocolError):
    """A message type that this version of the protocol does not have."""


class PayloadMismatch(ProtocolError):
    """An array's bytes do not fit the dtype and shape its header announces."""


class OversizeMessage(ProtocolError):
    """A message larger than the receiver allows."""


class MissingCodec(ProtocolError):
    """A payload is compressed with a codec that is not installed here."""


class InvalidUse(Prenet4dError, ValueError):
    """A call that cannot be carried out as it was made; the message says what to do instead."""


class NoAnswer(Prenet4dError):
    """Nobody answered within the timeout."""

    frames_sent = 0
    """How many of the frames given to ``FrameSender.send`` were sent before: go on after them."""


class ConnectionRefused(Prenet4dError):
    """The service refused or dropped this receiver, or is gone: it needs a new one."""


class CommandRefused(Prenet4dError):
    """A control command was refused; the message says why."""
