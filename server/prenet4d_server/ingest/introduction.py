"""What the main process tells a new ingest process first, in one message over the pipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

import msgpack
import numpy as np

from prenet4d_server.config import Settings
from prenet4d_server.ingest.notices import Started
from prenet4d_server.ingest.ring import Layout, RingHandle


@dataclass(frozen=True, slots=True)
class Introduction:
    """What to do, where the frames go, and what another ingest process had begun."""

    settings: Settings
    """The service's."""
    ring: RingHandle
    layout: Layout | None
    """How the last one divided the ring; ``None``: not yet."""
    running: Started | None
    """The acquisition that another ingest process had begun when it died."""

    def pack(self) -> bytes:
        """Turn it into bytes."""
        layout, running = self.layout, self.running
        packed: bytes = msgpack.packb(
            {
                "settings": self.settings.model_dump(mode="json"),
                "ring": asdict(self.ring),
                "layout": None if layout is None else asdict(layout) | {"dtype": layout.dtype.name},
                "running": None if running is None else asdict(running),
            }
        )
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read what :meth:`pack` wrote."""
        told = msgpack.unpackb(data, use_list=False)
        layout, running = told["layout"], told["running"]
        return cls(
            settings=Settings(**told["settings"]),
            ring=RingHandle(**told["ring"]),
            layout=layout and Layout(**layout | {"dtype": np.dtype(layout["dtype"])}),
            running=running and Started(**running),
        )
