"""Batches that overlap on a device, in slots that are kept: the same results as one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import MomentBackend
from queued import QueuedLanes
from ringscan import BATCHES, CONFIG, SHAPE, assert_same, parts, rings

from prenet4d_engines import Corrector, DetectorRadii
from prenet4d_engines.models.inversion import blur_by_products, blur_by_shifts
from prenet4d_engines.resample import sum_by_products, sum_one_by_one
from prenet4d_engines.stages import Station


def queued(stations: int = 1) -> list[Station]:
    return [Station(MomentBackend(), QueuedLanes()) for _ in range(stations)]


def one_by_one(frames, sizes=BATCHES, **changes):
    corrector = Corrector(SHAPE, config=CONFIG, backend=MomentBackend(), **changes)
    return [corrector.process(frames[part], np.arange(90)[part]) for part in parts(sizes)]


def overlapped(frames, stations, sizes=BATCHES, **changes):
    corrector = Corrector(SHAPE, config=CONFIG, stations=stations, **changes)
    batches = []
    for part in parts(sizes):
        batches += corrector.submit(frames[part], np.arange(90)[part])
    return batches + corrector.finish()


@pytest.mark.parametrize(("stations", "masked"), [(1, True), (1, False), (3, True)])
def test_overlapped_batches_come_out_as_one_by_one(stations, masked):
    mask = np.ones(SHAPE, bool)
    mask[20:22] = not masked
    changes = {"pixel_mask": mask, "gain": 2.0, "saturation_value": 200.0, "scan_shape": (9, 10)}
    frames = rings()
    wanted = one_by_one(frames, **changes)
    assert wanted[-1].state == "locked"
    assert_same(overlapped(frames, queued(stations), **changes), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.float32, ">u2"])
def test_frames_of_every_type(dtype):
    frames = np.minimum(rings(), 255).astype(dtype)
    assert_same(overlapped(frames, queued()), one_by_one(frames))


def test_batches_are_returned_in_order_and_the_newest_ones_are_under_way():
    frames = rings()
    corrector = Corrector(SHAPE, config=CONFIG, stations=queued())
    returned = [
        len(corrector.submit(frames[part], np.arange(90)[part])) for part in parts((10,) * 5)
    ]
    assert returned == [0, 0, 1, 1, 1]
    assert [int(batch.indices[0]) for batch in corrector.finish()] == [30, 40]
    assert corrector.finish() == []


def test_frames_may_be_overwritten_once_their_batch_is_returned():
    frames, wanted = rings(), one_by_one(rings(), sizes=(15,) * 6)
    ring = np.zeros((4, 15, *SHAPE), np.uint16)
    corrector, batches = Corrector(SHAPE, config=CONFIG, stations=queued()), []
    for number, part in enumerate(parts((15,) * 6)):
        ring[number % 4] = frames[part]
        batches += corrector.submit(ring[number % 4], np.arange(90)[part])
    assert_same(batches + corrector.finish(), wanted)


def test_what_was_recorded_outlives_changes_of_ellipse_reference_and_detectors():
    frames, (station,) = rings(), queued()
    lanes = station.lanes
    assert isinstance(lanes, QueuedLanes)
    ours = Corrector(SHAPE, config=CONFIG, stations=[station])
    theirs = Corrector(SHAPE, config=CONFIG, backend=MomentBackend())
    found, wanted, recorded = [], [], []
    for number, part in enumerate(parts((10,) * 9)):
        if number == 6:
            found += ours.finish()
            for corrector in (ours, theirs):
                corrector.set_reference_center((20.0, 30.0))
                corrector.set_detectors(DetectorRadii(5, 6, 12))
        found += ours.submit(frames[part], np.arange(90)[part])
        wanted.append(theirs.process(frames[part], np.arange(90)[part]))
        recorded.append(lanes.recorded)
    found += ours.finish()
    assert found[0].ellipticity.ratio == 1
    assert found[4].ellipticity.ratio > 1.02
    assert found[-1].reference_center == (20.0, 30.0)
    assert recorded[-1] == recorded[5]
    assert_same(found, wanted)


def test_the_next_acquisition_with_this_detector_records_nothing_anew():
    frames, (station,) = rings(), queued()
    lanes = station.lanes
    assert isinstance(lanes, QueuedLanes)
    first = overlapped(frames, [station])
    recorded = lanes.recorded
    assert_same(overlapped(frames, [station]), first)
    assert lanes.recorded == recorded
    overlapped(frames, [station], gain=3.0)
    assert lanes.recorded > recorded


def test_a_batch_larger_than_a_slot_is_spread_over_several():
    frames, (station,) = rings(), queued()
    station.most = 4
    assert_same(overlapped(frames, [station]), one_by_one(frames))


def test_no_frames_at_all():
    (batch,) = overlapped(rings()[:0], queued(), sizes=(0,))
    assert batch.corrected.shape == (0, *SHAPE)


def test_commands_between_batches_that_are_under_way():
    frames = rings()
    corrector = Corrector(SHAPE, config=CONFIG, stations=queued())
    for part in parts((32, 32)):
        corrector.submit(frames[part], np.arange(90)[part])
    corrector.freeze()
    assert corrector.state == "frozen"
    mean, patterns = corrector.mean()
    assert patterns > 0
    assert np.nansum(mean) == pytest.approx(30_000, rel=0.05)
    corrector.recalibrate()
    assert corrector.mean()[1] == 0
    corrector.load(corrector.calibration())
    assert corrector.state == "locked"
    assert len(corrector.finish()) == 2


@settings(max_examples=15)
@given(st.data())
def test_both_ways_to_add_up_recentered_images_agree(data):
    n, h, w = (data.draw(st.integers(1, most)) for most in (4, 20, 20))
    seed = data.draw(st.integers(0, 1000))
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(n, h, w, generator=random)
    shifts = 12 * torch.rand(n, 2, generator=random, dtype=torch.float64) - 6
    if data.draw(st.booleans()):
        shifts = shifts.round()
    valid = torch.rand(h, w, generator=random) > 0.2 if data.draw(st.booleans()) else None
    which = (torch.rand(n, generator=random) > 0.3) if data.draw(st.booleans()) else None
    one, other = (way(images, shifts, valid, which) for way in (sum_one_by_one, sum_by_products))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_both_ways_to_smooth_agree():
    counts = torch.rand((2, 24, 31), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blur_by_shifts(counts), blur_by_products(counts))
