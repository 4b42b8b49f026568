"""What every message is made of: a header, and rules for the arrays that follow it."""

from __future__ import annotations

import time as _time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1

Shape: TypeAlias = tuple[Annotated[int, Field(ge=0)], ...]
DType = Literal["bool", "uint8", "uint16", "uint32", "int64", "float32", "float64"]
FrameDType = Literal["uint8", "uint16", "uint32", "float32"]


class Part(BaseModel):
    """Base of every model; receivers ignore the fields that they do not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


@dataclass(frozen=True, slots=True)  # no model: two are made for every message of frames
class ArraySpec:
    """How one array part is to be read."""

    name: str
    dtype: DType
    shape: Shape
    encoding: Literal["raw", "lz4"] = "raw"
    """``lz4``: one bare LZ4 block of the array's bytes."""


class ArrayRule(NamedTuple):
    """What a message type demands of one of its arrays."""

    dtypes: tuple[str, ...]
    """Any one of these."""
    shape: tuple[str | int, ...]
    """A letter stands for the same size in all arrays of the message."""
    doc: str
    optional: bool = False


class Header(Part):
    """The fields that every message carries."""

    LAYOUT: ClassVar[dict[str, ArrayRule]] = {}
    """The arrays of this message type, by name."""

    protocol: Literal["prenet4d"] = "prenet4d"
    version: Literal[1] = 1
    """Raised by any change that is more than a new field."""
    type: str
    """Which message this is; the same as the first part."""
    publisher: str = ""
    """Identifies the sending process's life: a new value means that it restarted. By it the service
    tells those who send frames apart, and lets one's acquisition end before another's begins: each
    needs one that no other has."""
    acquisition_id: str = ""
    """Empty where the message belongs to no acquisition. Its ``frames`` and its ``acquisition_end``
    carry that of its ``acquisition_start``."""
    sequence: Annotated[int, Field(ge=0)] = 0
    """Counts the messages of this type from this publisher, from 0, with no holes. A command has
    any number that its client likes; of frames, the service does not look at it."""
    time: float = Field(default_factory=_time.time)
    """When the message was made, in seconds since the epoch."""
    arrays: tuple[ArraySpec, ...] = ()
    """How to read the parts that follow the header, in their order."""


INDICES = ArrayRule(("int64",), ("n",), "Number of each frame within the acquisition, from 0.")
