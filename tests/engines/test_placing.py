"""From what was found in frames to where they go."""

import numpy as np

from prenet4d_engines import CorrectorConfig, FrameFlag
from prenet4d_engines.placing import Placing


def found(center: tuple[float, float], *others: tuple[float, float, float, float]) -> np.ndarray:
    row = [*center, 0.1, 0.1, 1.0, 1000.0, 0.0]
    for k in range(3):
        row += others[k] if k < len(others) else (0.0, 0.0, 1.0, 0.0)
    return np.array([row], np.float32)


def test_the_beam_that_the_track_expects_is_followed_where_another_one_is_brighter():
    placing = Placing((8, 8), CorrectorConfig())
    for i in range(12):
        placing.place(np.array([i]), found((60.0, 61.0)), (63.5, 63.5))
    shown = found((60.0, 75.0), (40.0, 61.0, 1.0, 0.5), (60.3, 60.8, 1.0, 0.2))
    placed = placing.place(np.array([12]), shown, (63.5, 63.5))
    np.testing.assert_allclose(placed.applied, [[60, 61]], atol=0.3)
    np.testing.assert_array_equal(placed.fields["center"], [[60, 75]])
    assert placed.fields["flags"][0] & FrameFlag.OUTLIER
    assert not placed.averaged.any()
    assert placed.beam.all()
