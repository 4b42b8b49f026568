"""What can go wrong on the server's side, as one small tree.

ServiceError                    ``code`` names it in events, counters and logs
├── ConfigError                 the configuration does not make sense; nothing was started
├── BindError                   an address cannot be bound (in use, not this machine's)
├── IngestDied                  the ingest process is gone
├── CommandFailed               a control command cannot be carried out
├── FileError                   a data file cannot be read or written
│   └── HalfWrittenFile         it is truncated or still being written
├── SourceError                 what comes from the detector is no use; the service goes on
│   ├── NotReached              nothing comes: it has not been reached
│   ├── BadMessage              not of this protocol, truncated, oversize, wrong version
│   ├── BadStart                an acquisition announced with impossible properties
│   ├── ScanMismatch            an acquisition announced with other frames than its scan has
│   ├── SequenceError           start, frames and end do not come in a possible order
│   └── CorrectedTwice          what is replayed was corrected when it was recorded
└── FrameError                  one frame cannot be used; it is counted as rejected
    ├── CorruptFrame            its compressed bytes do not decode to a frame
    ├── WrongFrame              its shape or dtype is not the acquisition's
    ├── UnknownAcquisition      it belongs to no acquisition that is running
    ├── IndexOutsideScan        its index is negative or past the end of the scan
    ├── DuplicateFrame          its index came before
    └── BadCounts               NaN, infinite or negative counts
"""

from typing import ClassVar, Final

COMMAND_FAULT: Final = "The service failed at this command, and goes on; its log says why."
"""What is told of an error that nobody foresaw in a command."""


class ServiceError(Exception):
    """Base of every error this package raises on purpose."""

    code: ClassVar[str] = "service_error"
    exit_status: int = 1
    """Of a command that it ends."""


class ConfigError(ServiceError):
    """The configuration does not make sense; nothing was started."""

    code = "bad_configuration"


class BindError(ServiceError):
    """An address cannot be bound."""

    code = "cannot_bind"


class IngestDied(ServiceError):
    """The ingest process is gone."""

    code = "ingest_died"


class CommandFailed(ServiceError):
    """A control command cannot be carried out; the message is sent to who asked."""

    code = "command_failed"


class FileError(ServiceError):
    """A data file cannot be read or written."""

    code = "file_error"


class HalfWrittenFile(FileError):
    """A data file is truncated or still being written."""

    code = "half_written_file"


class SourceError(ServiceError):
    """What comes from the detector is no use; the service goes on."""

    code = "source_error"


class NotReached(SourceError):
    """The detector has not been reached; the service goes on trying."""

    code = "detector_not_reached"


class BadMessage(SourceError):
    """A message that is not of the protocol, truncated, oversize or of another version."""

    code = "bad_message"


class BadStart(SourceError):
    """An acquisition announced with impossible properties."""

    code = "bad_start"


class ScanMismatch(SourceError):
    """An acquisition announced with another number of frames than its scan has; it begins."""

    code = "scan_mismatch"


class NoPixelMask(SourceError):
    """The detector masks pixels and does not say which; the acquisition begins."""

    code = "no_pixel_mask"


class SequenceError(SourceError):
    """Start, frames and end do not come in a possible order."""

    code = "out_of_sequence"


class CorrectedTwice(SourceError):
    """What is replayed was corrected when it was recorded."""

    code = "corrected_twice"


class FrameError(ServiceError):
    """One frame cannot be used; it is counted as rejected under ``code``."""

    code = "bad_frame"


class CorruptFrame(FrameError):
    """A frame whose compressed bytes do not decode to a frame."""

    code = "corrupt"


class WrongFrame(FrameError):
    """A frame whose shape or dtype is not the acquisition's."""

    code = "wrong_shape_or_dtype"


class UnknownAcquisition(FrameError):
    """A frame that belongs to no acquisition that is running."""

    code = "no_acquisition"


class IndexOutsideScan(FrameError):
    """A frame whose index is negative or past the end of the scan."""

    code = "index_outside_scan"


class DuplicateFrame(FrameError):
    """A frame whose index came before."""

    code = "duplicate_index"


class BadCounts(FrameError):
    """A frame with NaN, infinite or negative counts."""

    code = "bad_counts"
