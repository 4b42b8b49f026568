"""The patterns' panel, without a browser: where detectors are drawn and what a drag asks for."""

from types import SimpleNamespace

import numpy as np
import pytest

from prenet4d_client.messages import DetectorRadii, Ellipticity, Preview
from prenet4d_client.wire import Message
from prenet4d_server.page.patterns import Patterns
from prenet4d_server.page.theme import THEMES

RADII = DetectorRadii(bright_field_radius=5, annular_inner=8, annular_outer=25)


def seen(center):
    """What the feed has once a frame was moved to that reference center."""
    preview = Preview(
        index=0, frame_shape=(64, 64), binning=1, center=(30, 30), reference_center=center,
        ellipticity=Ellipticity(), dose=1.0,
    )  # fmt: skip
    images = dict.fromkeys(("raw", "corrected"), np.ones((64, 64), np.float32))
    maps = SimpleNamespace(header=SimpleNamespace(detectors=RADII))
    return SimpleNamespace(preview=Message(preview, images), maps=maps)


def test_detectors_move_with_the_reference_center_and_a_drag_changes_one_of_them():
    asked = []
    patterns = Patterns(THEMES["dark"], lambda *radii: asked.append(radii))
    patterns.update(seen((31.5, 31.5)))
    patterns.update(seen((31.5, 41.5)))
    handles = patterns.corrected.select_one({"name": "radii"})
    data = {name: list(values) for name, values in handles.data.items()}
    away = np.hypot(data["x"][2] - 41.5, data["y"][2] - 31.5)
    data["x"][2] += (data["x"][2] - 41.5) / away
    data["y"][2] += (data["y"][2] - 31.5) / away
    handles.data = data
    assert asked == [pytest.approx((5, 8, 26))]
