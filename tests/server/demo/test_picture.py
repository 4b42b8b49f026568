"""The picture's parts measure what they say, and any scan makes a picture."""

from dataclasses import replace

import numpy as np
import pytest

from prenet4d_server.calibrate.unrolled import beam_radius, polar, radial_profile, ring_radii
from prenet4d_server.demo.picture import Scene, draw, example_position, virtual_image

from .test_score import score

CENTER = (31.5, 31.5)


def pattern(center=CENTER, beam=10.0, ring=18.0):
    y, x = np.mgrid[:64, :64]
    r = np.hypot(y - center[0], x - center[1])
    return beam / (1 + np.exp(r - 4)) + np.exp(-(((r - ring) / 1.5) ** 2)) + 0.01


def test_a_ring_is_straight_when_unrolled():
    unrolled = polar(pattern(), CENTER, 28.0)
    assert unrolled.shape == (56, 360)
    brightest = unrolled[20:].argmax(axis=0) / 2 + 10
    np.testing.assert_allclose(brightest, 18.0, atol=0.5)


def test_profile_tells_beam_and_rings():
    profile = radial_profile(pattern(), CENTER)
    assert beam_radius(profile) == pytest.approx(4.0, abs=0.6)
    assert ring_radii(profile) == pytest.approx([18.0], abs=0.5)


def test_hidden_beam_does_not_hide_the_rings():
    profile = radial_profile(pattern(beam=0.0), CENTER)
    assert ring_radii(profile) == pytest.approx([18.0], abs=0.5)


def test_virtual_detectors_sum_what_they_cover():
    patterns = np.stack([pattern(), 2 * pattern()])
    patterns[:, 0, 0] = np.nan
    bright = virtual_image(patterns, CENTER, 6.0, 31.0, inside=True)
    dark = virtual_image(patterns, CENTER, 6.0, 31.0, inside=False)
    assert bright[1] == pytest.approx(2 * bright[0])
    assert bright[0] == pytest.approx(pattern()[np.hypot(*(np.mgrid[:64, :64] - 31.5)) <= 6].sum())
    assert dark[0] < bright[0]


def scene(n=12):
    rng = np.random.default_rng(0)
    raw = rng.poisson(np.stack([pattern() for _ in range(n)])).astype(np.uint16)
    aligned = raw.astype(np.float32)
    aligned[:, :3] = np.nan
    return Scene(raw, aligned, aligned, CENTER, "a scan")


def test_the_example_is_off_center():
    given = score(tracked=0.1)
    tracked = np.full((12, 2), 31.5)
    tracked[5] += 4.0
    given = replace(given, found=replace(given.found, tracked=tracked))
    assert example_position(scene(), given) == 5


def test_any_scan_makes_a_picture(tmp_path):
    file = tmp_path / "demo.png"
    draw(scene(), score(), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    draw(replace(scene(), raw=np.zeros((12, 64, 64), np.uint16)), score(), file)
    assert file.stat().st_size < 600_000
