"""Scan maps from the service: they fill in, late comers miss nothing, the operator has a say."""

import numpy as np
import pytest

from prenet4d_client import CommandRefused, ControlClient, ScanMaps
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, frames, listening, sender, settings, until

FRAME = (16, 24)
SCAN = (5, 8)
N = SCAN[0] * SCAN[1]


def running(maps_every_s):
    """Corrects nothing: each frame's sum tells its number."""
    return Service(settings(batch={"size": 4}, stream={"maps_every_s": maps_every_s}))


@pytest.fixture(scope="module")
def service():
    with running(maps_every_s=0.01) as made:
        yield made


@pytest.fixture(autouse=True)
def _alone(service):
    """The next test finds no acquisition of this one's, however slowly its end is taken in."""
    yield
    until(lambda: service.status().acquisition is None)


def control(service):
    return ControlClient(service.endpoints["control"], timeout=TIMEOUT_S)


def following(service):
    """The only one who listens to the maps, and the service knows of it."""
    until(lambda: not service._publisher.wants("maps"))
    maps = ScanMaps(service.endpoints["stream"], service.endpoints["control"], timeout=TIMEOUT_S)
    until(lambda: service._publisher.wants("maps"))
    return maps


def start(source, scan_shape=SCAN):
    source.start(frame_shape=FRAME, dtype="uint16", scan_shape=scan_shape)


def expected(n=N):
    sums = np.full(N, np.nan)
    sums[:n] = np.arange(n) * FRAME[0] * FRAME[1]
    return sums.reshape(SCAN)


def until_filled(maps, n=N):
    return next(update for update in maps if update.frames == n)


def corrected(service, n):
    """The running acquisition has had so many frames corrected."""
    until(lambda: (now := service.status().acquisition) and now.counters.corrected == n)


def ended(service, source):
    """The acquisition is over, and its last word said."""
    source.end()
    until(lambda: service.status().acquisition is None)


def test_they_fill_in_while_the_scan_is_running(service):
    with following(service) as maps, sender(service) as source:
        start(source)
        source.send(frames(20, FRAME))
        update = until_filled(maps, 20)
        assert update.scan_shape == SCAN
        assert maps.names == (
            "bright_field", "annular_dark_field", "sum", "com_y", "com_x",
            "center_y", "center_x", "center_sigma", "flags",
        )  # fmt: skip
        np.testing.assert_array_equal(maps["sum"], expected(20))
        assert (maps["center_y"][0] == 7.5).all()
        source.send(frames(N, FRAME)[20:])
        source.end()
        until_filled(maps)
        np.testing.assert_array_equal(maps["sum"], expected())
        np.testing.assert_allclose(maps["com_y"].ravel()[1:], 0, atol=1e-4)


def test_who_comes_in_the_middle_or_after_the_end_misses_nothing(service):
    with following(service) as first, sender(service) as source:
        start(source)
        source.send(frames(20, FRAME))
        until_filled(first, 20)
        with ScanMaps(service.endpoints["stream"], service.endpoints["control"]) as late:
            assert next(late).region == (0, 0, *SCAN)
            np.testing.assert_array_equal(late["sum"], expected(20))
            source.send(frames(N, FRAME)[20:])
            source.end()
            until_filled(late)
            np.testing.assert_array_equal(late["sum"], expected())
        with ScanMaps(service.endpoints["stream"], service.endpoints["control"]) as last:
            next(last)
            np.testing.assert_array_equal(last["sum"], expected())


def test_the_next_acquisition_starts_anew(service):
    with following(service) as maps, sender(service) as source:
        for scan in (SCAN, (2, 3)):
            start(source, scan)
            source.send(frames(scan[0] * scan[1], FRAME))
            source.end()
            update = next(u for u in maps if u.scan_shape == scan and u.frames == np.prod(scan))
            assert maps["sum"].shape == scan
            assert np.isfinite(maps["sum"]).all()
    assert update.acquisition_id


def test_updates_and_the_whole_join_without_a_seam(service):
    """What the control socket hands out holds the updates up to its number, and lacks no other."""
    with listening(service, ("maps",)) as listener, sender(service) as source:
        start(source)
        with control(service) as client:
            until(lambda: service._pipeline.view.started is not None)
            wholes = []
            for i in range(0, N, 4):
                source.send(frames(N, FRAME)[i : i + 4])
                wholes.append(client.maps())
            corrected(service, N)
            ended(service, source)
            wholes.append(client.maps())
        last = wholes[-1][0].sequence
        until(lambda: any(update.sequence == last for update in listener.of("maps")))
    updates = {update.sequence: update for update in listener.of("maps")}
    assert sorted(updates) == list(range(min(updates), max(updates) + 1))
    added = np.full((9, *SCAN), np.nan, np.float32)
    states = {}
    for sequence in sorted(updates):
        y0, x0, height, width = updates[sequence].region
        added[:, y0 : y0 + height, x0 : x0 + width] = updates[sequence].values
        states[sequence] = added.copy()
    final = wholes[-1][1].copy()
    for header, values in wholes:
        told = states.get(header.sequence, np.full_like(final, np.nan))[5:]  # before the first
        np.testing.assert_array_equal(values[5:][np.isfinite(told)], told[np.isfinite(told)])
        for sequence in range(header.sequence + 1, last + 1):
            y0, x0, height, width = updates[sequence].region
            values[:, y0 : y0 + height, x0 : x0 + width] = updates[sequence].values
        np.testing.assert_array_equal(values[5:], final[5:])
    np.testing.assert_array_equal(final[2], expected())


def test_unchanged_maps_are_not_sent_again(service):
    with control(service) as client, sender(service) as source:
        start(source)
        source.send(frames(N, FRAME))
        corrected(service, N)
        ended(service, source)
        header, _ = client.maps()
        assert client.maps(newer_than=header) is None
        other = header.model_copy(update={"publisher": "another life"})
        assert client.maps(newer_than=other) is not None


def test_a_lossless_receiver_gets_the_last_update_before_the_end(service):
    topics = ("maps", "acquisition_end")
    with listening(service, topics) as listener, sender(service) as source:
        start(source)
        source.send(frames(N, FRAME))
        source.end()
        listener.wait_for("acquisition_end")
        kinds = [message.header.type for message in listener.messages]
    assert kinds[-1] == "acquisition_end"
    assert listener.of("maps")[-1].frames == N


def test_before_the_first_acquisition_there_are_none():
    with running(maps_every_s=0.01) as fresh, control(fresh) as client:
        for command in (client.maps, lambda: client.set_reference_center(5, 6)):
            with pytest.raises(CommandRefused, match="No acquisition has begun yet"):
                command()
        assert not client.status()["maps"]["available"]


def test_without_a_scan_shape_the_status_says_why_there_are_none(service):
    with control(service) as client, sender(service) as source:
        start(source, None)
        source.send(frames(4, FRAME))
        corrected(service, 4)
        said = client.status()["maps"]
        assert not said["available"]
        assert "shape of its scan is not known" in said["why_not"]
        with pytest.raises(CommandRefused, match="--scan 64x64"):
            client.maps()


def test_a_scan_too_large_for_maps_is_corrected_without_them(service):
    with control(service) as client, sender(service) as source:
        start(source, (1 << 12, 1 << 11))
        source.send(frames(8, FRAME))
        corrected(service, 8)
        assert "4,194,304" in client.status()["maps"]["why_not"]


def test_the_operators_detectors_hold_for_later_frames_and_acquisitions(service):
    with (
        following(service) as maps,
        listening(service) as listener,
        control(service) as client,
        sender(service) as source,
    ):
        start(source)
        source.send(frames(20, FRAME))
        found = until_filled(maps, 20).detectors
        assert found.automatic
        client.set_detectors(2.5, annular_inner=3, annular_outer=7.5)
        assert "bright field up to 2.5 px" in listener.wait_for_event("detectors_set").message
        source.send(frames(N, FRAME)[20:])
        source.end()
        update = until_filled(maps)
        assert not update.detectors.automatic
        assert update.detectors.annular_outer == 7.5
        area = maps["bright_field"].ravel()[1:] / np.arange(1, N)
        np.testing.assert_allclose(area[19:], np.pi * 2.5**2, rtol=0.03)
        np.testing.assert_allclose(area[:19], np.pi * found.bright_field_radius**2, rtol=0.03)
        start(source, (2, 10))
        source.send(frames(20, FRAME))
        source.end()
        assert until_filled(maps, 20).detectors.annular_outer == 7.5
        client.clear_detectors()
        start(source)
        source.send(frames(N, FRAME))
        source.end()
        assert until_filled(maps).detectors == found


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        ("set_detectors", {}, "bright_field_radius, annular_inner, annular_outer, in pixels"),
        (
            "set_detectors",
            {"bright_field_radius": 3, "annular_inner": 5, "annular_outer": 4},
            "below the outer one",
        ),
        (
            "set_detectors",
            {"bright_field_radius": float("nan"), "annular_inner": 5, "annular_outer": 9},
            "above 0",
        ),
        ("set_reference_center", {"center": [1]}, r"center: \[cy, cx\] in pixels"),
        ("set_reference_center", {"center": ["a", True]}, r"\[cy, cx\]"),
        ("set_reference_center", {"center": [100, 3]}, "frame of 16 × 24 pixels"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_and_change_nothing(
    service, command, arguments, why
):
    until(lambda: not service._publisher.wants("maps"))
    with control(service) as client, sender(service) as source:
        start(source)
        source.send(frames(4, FRAME))
        corrected(service, 4)
        with pytest.raises(CommandRefused, match=why):
            client._result(command, **arguments)
        source.send(frames(8, FRAME)[4:])
        corrected(service, 8)
        assert client.maps()[0].detectors is None  # nobody listened: nothing was measured
        until(lambda: client.status()["reference_center"] == [7.5, 11.5])


def test_the_reference_center_can_be_moved_and_moved_back(service):
    with listening(service) as listener, control(service) as client, sender(service) as source:
        start(source)
        source.send(frames(4, FRAME))
        corrected(service, 4)
        client.set_reference_center(5, 6.5)
        listener.wait_for_event("reference_center_set")
        source.send(frames(8, FRAME)[4:])
        until(lambda: client.status()["reference_center"] == [5, 6.5])
        ended(service, source)
        start(source)
        source.send(frames(4, FRAME))
        until(lambda: client.status()["reference_center"] == [5, 6.5])
        client.clear_reference_center()
        source.send(frames(8, FRAME)[4:])
        until(lambda: client.status()["reference_center"] == [7.5, 11.5])


def test_where_nobody_listens_nothing_is_measured_or_sent(service):
    until(lambda: not service._publisher.wants("maps"))
    with sender(service) as source:
        start(source)
        source.send(frames(N, FRAME))
        corrected(service, N)
        ended(service, source)
        with control(service) as client:
            header, values = client.maps()
        assert header.frames == N
        assert np.isnan(values[:5]).all()
        assert np.isfinite(values[5:7]).all()


def test_updates_come_at_a_bounded_rate():
    with (
        running(maps_every_s=3600.0) as slow,
        listening(slow, ("maps", "acquisition_end")) as listener,
        sender(slow) as source,
    ):
        start(source)
        source.send(frames(N, FRAME))
        source.end()
        listener.wait_for("acquisition_end")
        empty, first, last = listener.of("maps")
        assert empty.frames == 0  # the first in the service's life
        assert 0 < first.frames < last.frames == N
