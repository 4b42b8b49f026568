"""What the page says, before a service answers, during a scan, and when things go wrong."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from prenet4d_client import messages as m
from prenet4d_client.messages import Counters, Ellipticity
from prenet4d_engines.descan import fit_descan
from prenet4d_server.page import words
from prenet4d_server.page.feed import Feed, MapsView
from prenet4d_server.page.maps import (
    KINDS,
    caption,
    color_range,
    direction_colors,
    picture,
    scale,
    short,
)
from prenet4d_server.page.patterns import limits, rounded
from prenet4d_server.page.session import TEXTS
from prenet4d_server.page.settings import ServiceAddress

from .telling import event, sent, start, telemetry


@pytest.fixture
def feed():
    return Feed(ServiceAddress(stream="tcp://127.0.0.1:1", control="tcp://10.0.0.1:5563"))


def plain(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_everything_has_something_to_say_before_anything_is_known(feed):
    for name, tell in TEXTS.items():
        said = plain(tell(feed)).strip()
        assert said, name
        assert "None" not in said


def test_a_service_that_does_not_answer_is_told_with_the_time(feed):
    assert "Connecting to the service at tcp://10.0.0.1:5563" in words.banner(feed)
    feed.unanswered_since, feed.trouble = 1_700_000_000.0, "The service does not answer"
    clock = words.clock(1_700_000_000.0)
    assert f"does not answer since {clock}; trying again" in words.banner(feed)


@pytest.mark.parametrize(
    ("healthy", "ready", "said"),
    [(False, False, "has died"), (True, False, "being started"), (True, True, "No acquisition")],
)
def test_the_banner_says_what_is_missing(feed, healthy, ready, said):
    source = SimpleNamespace(address="tcp://<detector>")
    feed.status = SimpleNamespace(
        healthy=healthy,
        ready=ready,
        source=source,
        alarms=(),
        acquisition=None,
        counters=Counters(),
    )
    assert said in words.banner(feed)
    assert "<detector>" not in words.banner(feed)


def test_who_comes_after_the_scan_is_told_how_it_stood(feed):
    feed.status = SimpleNamespace(
        healthy=True, ready=True, source=SimpleNamespace(address="tcp://d:1"), alarms=(),
        acquisition=None, counters=Counters(received=5000, corrected=5000), state="locked",
        patterns_averaged=1024, ellipticity=Ellipticity(ratio=1.03, theta=0.5, ratio_sigma=0.002),
        frames_per_second=0.0, backlog=0, recent_events=(), publisher="p",
    )  # fmt: skip
    assert "The last scan has ended; 5,000 frames came" in words.banner(feed)
    assert "no acquisition yet" not in words.title(feed)
    assert "Locked" in plain(words.state(feed))
    assert "from 1,024 patterns" in plain(words.state(feed))
    assert "1.0300 ± 0.0020" in plain(words.ellipticity(feed))
    feed.status.ellipticity = Ellipticity(ratio=1.03, theta=0.5)  # it was given without a sigma
    assert "long axis at 28.6°" in plain(words.ellipticity(feed))
    assert "5,000" in plain(words.progress(feed))
    feed.status.acquisition = SimpleNamespace(acquisition_id="<scan>")  # or while one is running
    assert plain(words.title(feed)) == "&lt;scan&gt;"
    assert words.banner(feed) == ""


def test_a_running_scan_in_figures(feed):
    feed.patterns_to_lock = 256
    feed.take(start())
    feed.take(telemetry(tracked=np.full((4, 2), 7.5, np.float32)))
    feed.take(telemetry(tracked=np.array([[7.5, 7.5], [10.5, 11.5]], np.float32), frames=2))
    assert words.banner(feed) == "" or feed.status is None
    assert "ellipticity not stable yet: 83 of 256 patterns" in plain(words.state(feed))
    assert "10.5, 11.5 px" in plain(words.center(feed))
    assert "moved 5.0 px" in plain(words.center(feed))
    assert "1.0300 ± 0.0020" in plain(words.ellipticity(feed))
    assert "28.6° ± 5.7°" in plain(words.ellipticity(feed))
    assert "40 %" in plain(words.progress(feed))
    assert "0:00 left" in plain(words.progress(feed))
    assert "8 of 20" in plain(words.progress(feed))
    assert "10 / 30 ms p50 / p99 · 3 waiting" in plain(words.rate(feed))


def test_what_is_wrong_stands_in_large_letters(feed):
    feed.take(start())
    feed.take(telemetry())
    alarms = [
        SimpleNamespace(message="Detector silent for 5 s.", since=1000.0),
        SimpleNamespace(message="Subscriber <b> is behind.", since=1000.0),
    ]
    feed.status = SimpleNamespace(healthy=True, ready=True, alarms=alarms, frames_per_second=0.0)
    said = words.banner(feed)
    assert "Detector silent for 5 s." in said
    assert "Subscriber &lt;b&gt; is behind." in said
    assert said.count("banner watch") == 2
    assert "no frames are coming" in plain(words.progress(feed))
    feed.status.alarms = []
    assert words.banner(feed) == ""


def seen(y: np.ndarray, x: np.ndarray) -> MapsView:
    """Maps of a scan whose center was found there, and the descan fitted to it."""
    fit = fit_descan(np.stack([y, x]), np.full((2, *y.shape), 0.1))
    header = m.Maps(
        acquisition_id="scan", scan_shape=y.shape, region=(0, 0, 0, 0), names=(), frames=y.size,
        descan=None if fit is None else m.Descan.model_validate(fit.model_dump()),
    )  # fmt: skip
    return MapsView.of(header, {"center_y": y, "center_x": x})


def test_the_descan_is_told_and_drawn_beside_what_was_measured(feed):
    v, u = np.mgrid[-1:1:30j, -1:1:40j].astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 0.05, (2, 30, 40)).astype(np.float32)
    y, x = 60 + 2 * v - 3 * u + noise[0], 62 + 0.5 * v + 4 * u + noise[1]
    y[25:] = x[25:] = np.nan  # not scanned yet
    assert "Not fitted yet" in words.descan(feed)
    feed.maps = seen(y, x)
    said = plain(words.descan(feed))
    assert "First to last column, y, x-6.0, +8.0 px" in said
    assert "First to last row, y, x+4.0, +1.0 px" in said
    images = feed.maps.images
    fitted, rest = picture("fit_y", images), picture("rest_y", images)
    measured = picture("center_y", images)
    np.testing.assert_allclose(fitted - np.nanmedian(fitted[:25]), 2 * v - 3 * u
                               - np.median((2 * v - 3 * u)[:25]), atol=0.1)  # fmt: skip
    np.testing.assert_allclose(rest[:25], (measured - fitted)[:25], atol=1e-4)
    assert np.isnan(rest[25:]).all()
    kinds = {kind.name: kind for kind in KINDS}
    assert scale(kinds["fit_y"], fitted, images) == scale(kinds["center_y"], measured, images)
    assert scale(kinds["rest_y"], rest, images)[1] < 0.3


def test_a_scan_without_a_fit_shows_none(feed):
    view = seen(np.full((3, 4), 7.0, np.float32), np.full((3, 4), 7.0, np.float32))
    assert picture("fit_x", view.images) is picture("rest_x", view.images) is None
    assert picture("center_x", view.images) is not None


def test_large_scans_are_thinned_out_and_the_fit_with_them(feed):
    v, u = np.mgrid[-1:1:20j, -1:1:401j].astype(np.float32)
    view = seen(60 + v, 60 + 3 * u)
    assert view.step == 2
    assert view.images["fit_x"].shape == view.images["center_x"].shape == (10, 201)
    np.testing.assert_allclose(view.images["fit_x"], view.images["center_x"], atol=1e-3)


def test_counters_that_do_not_balance_are_seen(feed):
    feed.take(telemetry())
    assert "✓" in words.counters(feed)
    feed.take(telemetry(counters=m.Counters(received=10, corrected=7)))
    assert "+3" in words.counters(feed)


def test_what_comes_over_the_wire_cannot_write_html(feed):
    feed.take(start("<script>alert(1)</script>"))
    feed.take(event("<img src=x onerror=alert(1)>"))
    for tell in TEXTS.values():
        assert "<script>" not in tell(feed)
        assert "<img" not in tell(feed)
        assert "<camera>" not in tell(feed)


def test_progress_is_complete_only_when_it_is(feed):
    almost = m.Counters(received=1999, corrected=1999)
    feed.take(telemetry(expected_frames=2000, counters=almost))
    assert "99 %" in plain(words.progress(feed))


def test_durations_read_as_clocks_do():
    assert [words.duration(s) for s in (0, 59.6, 83, 7325)] == ["0:00", "1:00", "1:23", "2:02:05"]


def test_a_frame_is_told_with_its_place(feed):
    header = m.Preview(
        index=13, scan_shape=(4, 5), frame_shape=(64, 64), binning=2, center=(3, 3),
        reference_center=(3, 3), ellipticity=m.Ellipticity(), dose=1234.4, time=1000.0,
    )  # fmt: skip
    image = np.ones((32, 32), np.float32)
    said = words.telling(sent(header, {"raw": image, "corrected": image}))
    clock = words.clock(1000.0)
    assert said == f"frame 13 at row 2, column 3 · 1,234 e⁻ · binned 2 × · {clock}"


# --- images -------------------------------------------------------------------------------------


def test_contrast_cuts_off_both_ends():
    image = np.linspace(0, 1000, 10001, dtype=np.float32).reshape(1, -1)
    assert limits(image, "linear", (0, 100)) == pytest.approx((0, 999))
    assert limits(image, "linear", (10, 50)) == pytest.approx((99.9, 499.5))
    low, high = limits(image, "log", (0, 100))
    assert (low, high) == pytest.approx((0.0999, 999))
    assert limits(image, "log", (50, 100))[0] == pytest.approx((low * high) ** 0.5)


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("value", [0.0, np.nan, 3.0])
def test_flat_and_empty_images_have_a_scale_too(scale, value):
    low, high = limits(np.full((4, 4), value, np.float32), scale, (100, 100))
    assert low < high
    assert low > 0 or scale == "linear"


def test_rounding_for_the_link_keeps_the_picture():
    image = np.random.default_rng(0).gamma(1.0, 100.0, (64, 64)).astype(np.float32)
    image[3, 3], image[4, 4] = np.nan, 0
    short_ones = rounded(image)
    np.testing.assert_allclose(short_ones, image, rtol=1 / 256)
    assert (short_ones.view(np.uint32)[np.isfinite(image)] & 0x7FFF == 0).all()


# Linear sRGB as it looks without one of the three cones (Machado, Oliveira and Fernandes 2009).
SEES = {
    "all": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}  # fmt: skip


def cielab(pixels, sees):
    """sRGB pixels (…, 3) as people see them."""
    srgb = pixels / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = np.clip(linear @ np.transpose(SEES[sees]), 0, 1) @ to_xyz.T / to_xyz.sum(axis=1)
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("sees", SEES)
def test_directions_are_told_apart_by_whoever_looks(sees):
    angles = np.arange(8) * np.pi / 4
    y, x = (np.append(part(angles), 0).astype(np.float32)[None] for part in (np.sin, np.cos))
    pixels = direction_colors(y, x)[0, :, None].view(np.uint8)[:, :3]
    seen = cielab(pixels, sees)
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1e3 * np.eye(9)
    assert apart.min() > 15  # 2.3 can just be noticed
    turns = np.linalg.norm(seen[:8] - np.roll(seen[:8], 1, axis=0), axis=1)
    assert turns.max() < 2.5 * turns.min()


def test_vectors_show_their_direction_as_color_and_what_is_unknown_as_nothing():
    y = np.array([[0, 0, 1, np.nan]], np.float32)
    x = np.array([[1, -1, 0, 0]], np.float32)
    pixels = direction_colors(y, x)[..., None].view(np.uint8)
    assert pixels.shape == (1, 4, 4)
    assert (pixels[0, :3, 3] == 255).all()
    assert pixels[0, 3, 3] == 0
    assert pixels[0, 0, :3].argmin() == 2  # yellow
    assert pixels[0, 1, :3].argmax() == 2  # blue
    assert len({tuple(pixel) for pixel in pixels[0, :3]}) == 3
    (kind,) = (kind for kind in KINDS if kind.name == "com")
    for index, arrow in ((0, "→"), (1, "←")):
        red, green, blue, _ = pixels[0, index]
        assert f'rgb({red}, {green}, {blue})">{arrow}' in caption(kind)


def test_maps_are_shown_as_people_read_them():
    center = np.array([[5, 6, 7, np.nan]], np.float32)
    drift = picture("center_y", {"center_y": center})
    np.testing.assert_array_equal(drift, [[-1, 0, 1, np.nan]])
    low, high = color_range("center_y", drift)
    assert low == -high
    flags = picture("flags", {"flags": np.array([[0, 4, np.nan]], np.float32)})
    np.testing.assert_array_equal(flags, [[0, 1, np.nan]])
    assert picture("com", {}) is None
    assert picture("sum", {}) is None
    low, high = color_range("sum", np.full((2, 2), np.nan, np.float32))
    assert low < high


def test_large_numbers_are_short():
    assert [short(v) for v in (0.0123, 12.345, 6720, 7.77e6)] == [
        "0.0123",
        "12.3",
        "6.72k",
        "7.77M",
    ]
