"""Scan maps: each frame's figures at its probe position, whatever the order they come in."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_engines import FrameFlag, IdentityCorrector, MapAccumulator
from prenet4d_engines.errors import FrameError
from prenet4d_engines.maps import MAP_NAMES, Region

SHAPE = (16, 24)
SCAN = (5, 7)


def batch_of(indices, **changes):
    """A batch whose frames' sums, shifts and centers tell their indices."""
    indices = np.asarray(indices, np.int64)
    frames = np.zeros((len(indices), *SHAPE), np.uint16)
    batch = IdentityCorrector(SHAPE, wants_virtual=lambda: False).process(frames, indices)
    virtual = np.tile(np.arange(5, dtype=np.float32), (len(indices), 1))
    virtual[:, 2] = indices
    shift = np.stack((0.25 * indices, -0.5 * indices), axis=1).astype(np.float32)
    sigma = np.full((len(indices), 2), 0.5, np.float32)
    sigma[:, 1] = 0.1
    center = np.asarray(batch.reference_center, np.float32) - shift
    given = {
        "virtual": virtual,
        "shift": shift,
        "shift_sigma": sigma,
        "center": center,
        "center_sigma": sigma,
    }
    return replace(batch, **(given | changes))


def filled(indices=range(SCAN[0] * SCAN[1])):
    maps = MapAccumulator(SCAN)
    maps.add(batch_of(indices))
    return maps


def test_every_figure_lies_at_its_probe_position():
    maps = MapAccumulator(SCAN)
    flags = np.array([0, FrameFlag.OUTLIER], np.uint8)
    maps.add(batch_of([9, 34], flags=flags))
    at = {name: maps.values[i] for i, name in enumerate(MAP_NAMES)}
    assert (at["sum"][1, 2], at["sum"][4, 6]) == (9, 34)
    assert [at[name][1, 2] for name in ("bright_field", "annular_dark_field")] == [0, 1]
    assert [at[name][1, 2] for name in ("com_y", "com_x")] == [3, 4]
    assert (at["center_y"][1, 2], at["center_x"][1, 2]) == (7.5 - 2.25, 11.5 + 4.5)
    assert at["center_sigma"][1, 2] == pytest.approx(np.sqrt((0.25 + 0.01) / 2))
    assert (at["flags"][1, 2], at["flags"][4, 6]) == (0, FrameFlag.OUTLIER)
    assert maps.frames == 2
    assert np.isfinite(maps.values).sum() == 2 * len(MAP_NAMES)


def test_the_changed_region_is_the_rectangle_since_the_last_mark():
    maps = MapAccumulator(SCAN)
    assert maps.changed is None
    maps.add(batch_of([9, 10]))
    assert maps.changed == Region(1, 2, 1, 2)
    maps.add(batch_of([22]))
    assert maps.changed == Region(1, 1, 3, 3)
    maps.mark()
    assert maps.changed is None
    maps.add(batch_of([34]))
    assert maps.changed == Region(4, 6, 1, 1)


def test_frames_beyond_the_scan_are_left_out():
    maps = MapAccumulator(SCAN)
    maps.add(batch_of([35, 99]))
    assert (maps.frames, maps.changed) == (0, None)
    maps.add(batch_of([34, 35]))
    assert (maps.frames, maps.changed) == (1, Region(4, 6, 1, 1))


def test_frames_that_were_not_looked_at_have_no_counts_but_a_center():
    maps = MapAccumulator(SCAN)
    maps.add(batch_of([3], virtual=None))
    assert np.isnan(maps.values[:5, 0, 3]).all()
    assert np.isfinite(maps.values[5:, 0, 3]).all()
    assert maps.frames == 1


@given(st.permutations(range(35)), st.integers(1, 35))
def test_order_and_batches_make_no_difference(order, size):
    maps = MapAccumulator(SCAN)
    for start in range(0, 35, size):
        maps.add(batch_of(order[start : start + size]))
    np.testing.assert_array_equal(maps.values, filled().values)
    assert (maps.frames, maps.changed) == (35, Region(0, 0, *SCAN))


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 2, 2), (2.5, 2), 4])
def test_a_scan_without_probe_positions_is_refused(shape):
    with pytest.raises(FrameError, match="rows, columns"):
        MapAccumulator(shape)


def test_a_scan_too_large_for_maps_is_told():
    with pytest.raises(FrameError, match="4,194,304"):
        MapAccumulator((1 << 20, 1 << 20))


def test_the_descan_is_fitted_to_what_was_measured():
    """Frames whose center was not found, or not trusted, say nothing about the drift."""
    flags = np.zeros(35, np.uint8)
    flags[[3, 12]] = FrameFlag.NO_BEAM, FrameFlag.OUTLIER
    center = np.stack((np.full(35, 7.0), np.repeat(np.arange(5.0), 7) + 11), axis=1)
    center[[3, 12]] = 900
    maps = MapAccumulator(SCAN)
    maps.add(batch_of(range(35), flags=flags, center=center.astype(np.float32)))
    fit = maps.descan()
    assert fit.outliers == 0
    assert fit.coefficients_x[:3] == pytest.approx((13, 2, 0), abs=1e-3)
    assert fit.coefficients_y[:3] == pytest.approx((7, 0, 0), abs=1e-3)
    assert MapAccumulator(SCAN).descan() is None
