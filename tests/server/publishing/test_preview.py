"""The preview: one recent frame beside what became of it, for people to look at."""

from dataclasses import replace

import numpy as np
import pytest

from prenet4d_engines.geometry import Ellipticity
from prenet4d_engines.identity import IdentityCorrector
from prenet4d_server.ingest.notices import Started
from prenet4d_server.publishing import outgoing
from prenet4d_server.service import Service

from ..live import frames, sender, settings, subscriber, until


@pytest.fixture
def started():
    return Started(
        at=0,
        acquisition_id="a1",
        series="s1",
        frame_shape=(9, 12),
        dtype="uint16",
        slots=8,
        base=0,
        scan_shape=(2, 3),
        expected_frames=6,
        saturation_value=None,
        gain=1.0,
        detector="camera",
        metadata={},
        packed_mask=None,
    )


def test_a_large_frame_is_binned_to_whole_blocks_and_keeps_its_counts_per_pixel(started):
    raw = np.arange(9 * 12, dtype=np.uint16).reshape(9, 12)
    result = IdentityCorrector((9, 12)).process(raw[None], np.array([4]))

    header, arrays = outgoing.preview(started, result, raw, longest_side=6)

    assert (header.index, header.binning, header.scan_shape) == (4, 2, (2, 3))
    assert arrays["raw"].shape == (4, 6)
    assert arrays["raw"][1, 2] == raw[2:4, 4:6].mean()
    np.testing.assert_array_equal(arrays["raw"], arrays["corrected"])
    assert not any(np.may_share_memory(array, raw) for array in arrays.values())


def test_the_center_is_where_the_beam_was_before_it_was_moved(started):
    raw = np.ones((9, 12), dtype=np.uint16)
    result = replace(
        IdentityCorrector((9, 12)).process(raw[None], np.array([0])),
        shift=np.array([[1.5, -2.0]], dtype=np.float32),
        ellipticity=Ellipticity(1.02, 0.4),
        ratio_sigma=0.001,
    )

    header, _ = outgoing.preview(started, result, raw, longest_side=256)

    assert header.reference_center == (4.0, 5.5)
    assert header.center == (2.5, 7.5)
    assert (header.ellipticity.ratio, header.ellipticity.ratio_sigma) == (1.02, 0.001)
    assert header.binning == 1


def test_subscribers_get_recent_frames_at_a_bounded_rate():
    patient = settings(batch={"size": 2}, stream={"preview_every_s": 1000.0})
    with Service(patient) as service, subscriber(service, ("preview", "acquisition_end")) as stream:
        with sender(service) as source:
            source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(4, 5))
            source.send(frames(20))
            source.end()
        first, last = stream.receive(), stream.receive()

    assert (first.type, last.type) == ("preview", "acquisition_end")
    assert (first.raw == first.index).all()
    assert (first.corrected == first.index).all()
    assert (first.frame_shape, first.scan_shape) == ((16, 24), (4, 5))


def test_who_looks_after_the_scan_sees_its_last_frame():
    with Service(settings(batch={"size": 2})) as service:
        with sender(service) as source:
            source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(4, 5))
            source.send(frames(20))
            source.end()
        until(lambda: service.status().counters.corrected == 20)
        for _ in range(2):  # and again who comes after the first has left
            with subscriber(service, "preview") as stream:
                shown = stream.receive()
            assert (shown.raw == shown.index).all()
            assert shown.scan_shape == (4, 5)
            until(lambda: not service._publisher.wants("preview"))
            until(lambda: not service._pipeline._results._looked_at)
