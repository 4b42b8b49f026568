"""Frames that fool: beams stopped, cut, outshone or absent, as microscopes really deliver them.

`draw_difficult` draws a pattern together with its camera, since what hides the direct beam sits at
the direct beam. Most of such frames have one to three of these, one in eight has none: the direct
beam near the frame's edge or cut by it, its center in the frame or just outside; a disk that fills
much of the frame; a beam stop in front of it that nobody flagged; a reflection brighter than it;
strong stray light elsewhere; a flat-field error. A few have no beam at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from prenet4d_engines.simulate.content import log_uniform
from prenet4d_engines.simulate.detector import Detector, draw_detector
from prenet4d_engines.simulate.draw import draw_center, draw_optics, draw_pattern
from prenet4d_engines.simulate.materials import TRAINING, Material
from prenet4d_engines.simulate.pattern import FLAT, RADIUS, ROCK, Array, Kind, Pattern, X, Y

EDGE_REACH: Final = 0.45
"""Centers lie within this share of the frame's sides around its middle."""
_WITHOUT_BEAM: Final = 0.12
_CUT: Final = 0.12
_WIDE: Final = 0.1
_WIDEST: Final = 0.48
"""Radius of the widest disk, as a share of the frame's smaller side."""
_STOPPED: Final = 0.35
_STOPPED_KINDS: Final[dict[Kind, float]] = {
    "rings": 0.4,
    "grains": 0.2,
    "amorphous": 0.15,
    "spots": 0.15,
    "cbed": 0.1,
}


def draw_difficult(
    rng: np.random.Generator, frame_shape: tuple[int, int], *, material: Material | None = None
) -> tuple[Pattern, Detector]:
    """Draw a pattern whose direct beam is hard to find, and the camera that sees it.

    Args:
        rng: Source of randomness; the same state gives the same frame.
        frame_shape: (h, w) of the frame.
        material: Crystal, or None to draw one of the training materials.

    Returns:
        The pattern; `Pattern.has_beam` is False where nothing tells where the beam is. And the
        camera, with the beam stop and the flat-field error in its transmission.
    """
    if rng.random() < _WITHOUT_BEAM:
        return draw_without_beam(rng, frame_shape), draw_detector(rng, frame_shape)
    if rng.random() < _CUT:
        return _cut_beam(rng, frame_shape, material)
    if rng.random() < _WIDE:
        return draw_wide_beam(rng, frame_shape, material), draw_detector(rng, frame_shape)
    reach = EDGE_REACH if rng.random() < 0.5 else 0.2
    center = draw_center(rng, frame_shape, reach)
    stopped = rng.random() < _STOPPED
    kinds = list(_STOPPED_KINDS)
    kind = kinds[rng.choice(len(kinds), p=list(_STOPPED_KINDS.values()))] if stopped else None
    pattern = draw_pattern(rng, frame_shape, kind=kind, material=material, center=center)
    if pattern.kind in ("cbed", "spots") and rng.random() < 0.4:
        pattern = outshone(rng, pattern)
    if rng.random() < 0.25:
        pattern = replace(pattern, blobs=stray_light(rng, frame_shape, pattern.center))
    camera = draw_detector(rng, frame_shape)
    if stopped:
        pattern = replace(
            pattern,
            radial_share=max(pattern.radial_share, float(rng.uniform(0.3, 0.98)))
            if len(pattern.radial)
            else 0.0,
        )
        shadow = beam_stop(rng, frame_shape, pattern.center)
        if rng.random() < 0.25:
            camera = replace(camera, valid=camera.valid & (shadow > 0.5))
        camera = replace(camera, transmission=shadow)
    if rng.random() < 0.15:
        flat = rng.normal(1.0, rng.uniform(0.005, 0.05), frame_shape).clip(0.5, 1.5)
        if camera.transmission is not None:
            flat *= camera.transmission
        camera = replace(camera, transmission=flat.astype(np.float32))
    return pattern, camera


def _cut_beam(
    rng: np.random.Generator, frame_shape: tuple[int, int], material: Material | None
) -> tuple[Pattern, Detector]:
    """Draw a beam that the frame's edge cuts, with flares of its own beside it, often saturated."""
    kinds: tuple[Kind, ...] = ("vacuum", "vacuum", "cbed", "spots", "amorphous")
    kind = kinds[int(rng.integers(len(kinds)))]
    size = min(frame_shape)
    pattern = draw_pattern(rng, frame_shape, kind=kind, material=material)
    disks = pattern.disks.copy()
    if kind == "vacuum":
        disks[:, RADIUS] = log_uniform(rng, 0.02, 0.14) * size
    radius = float(disks[0, RADIUS])
    across = min(radius * rng.uniform(-0.8, 1.2), 0.4 * size)  # negative: its center lies outside
    # one axis near an edge, the other anywhere
    axis, far = int(rng.integers(2)), bool(rng.integers(2))
    center = [float(rng.uniform(0.1, 0.9) * side) for side in frame_shape]
    center[axis] = frame_shape[axis] - 1 - across if far else across
    blobs = np.empty((int(rng.integers(0, 5)), 4))
    angles = rng.uniform(0, 2 * np.pi, len(blobs))
    away = radius * rng.uniform(0.8, 3.5, len(blobs))
    blobs[:, 0], blobs[:, 1] = away * np.sin(angles), away * np.cos(angles)
    blobs[:, 2] = radius * rng.uniform(0.3, 1.2, len(blobs))
    blobs[:, 3] = rng.uniform(0.02, 0.5) * rng.dirichlet(np.ones(len(blobs))) if len(blobs) else 0
    camera = draw_detector(rng, frame_shape)
    if rng.random() < 0.5:
        camera = replace(camera, saturation=float(2 ** rng.integers(2, 12)))
    return replace(pattern.moved((center[0], center[1])), disks=disks, blobs=blobs), camera


def draw_wide_beam(
    rng: np.random.Generator, frame_shape: tuple[int, int], material: Material | None = None
) -> Pattern:
    """Draw a disk that fills much of the frame, as ptychography and bright-field imaging use it.

    Its radius is 0.2 to 0.48 of the frame's smaller side.
    """
    kinds: tuple[Kind, ...] = ("vacuum", "amorphous", "cbed")
    kind = kinds[int(rng.integers(len(kinds)))]
    if material is None:
        material = list(TRAINING.values())[rng.integers(len(TRAINING))]
    radius = float(rng.uniform(0.2, _WIDEST)) * min(frame_shape)
    optics = replace(draw_optics(rng, kind, material, frame_shape), radius=radius)
    return draw_pattern(rng, frame_shape, kind=kind, material=material, optics=optics)


def draw_without_beam(rng: np.random.Generator, frame_shape: tuple[int, int]) -> Pattern:
    """Draw a frame that does not tell where the beam is: even, stray light, or a beam outside."""
    h, w = frame_shape
    blank = draw_pattern(rng, frame_shape, kind="blank")
    how = rng.random()
    if how < 0.4:
        return blank
    if how < 0.75:
        return replace(
            blank,
            blobs=stray_light(rng, frame_shape, blank.center),
            floor=log_uniform(rng, 0.05, 1.0),
        )
    outside = draw_pattern(rng, frame_shape, kind="vacuum")
    far = float(outside.disks[0, RADIUS]) + rng.uniform(0.2, 0.6) * min(h, w)
    along = rng.uniform(0, 1)
    sides = ((-far, along * w), (h + far, along * w), (along * h, -far), (along * h, w + far))
    return replace(outside.moved(sides[int(rng.integers(4))]), kind="blank")


def outshone(rng: np.random.Generator, pattern: Pattern) -> Pattern:
    """Return the pattern with one or two strong reflections brighter than the direct beam."""
    disks = pattern.disks.copy()
    power = disks[:, FLAT] + disks[:, ROCK]
    power[np.hypot(disks[:, Y], disks[:, X]) == 0] = 0.0
    strong = np.argsort(power)[::-1][:8]
    strong = strong[power[strong] > 0]
    if not len(strong):
        return pattern
    chosen = rng.choice(strong, min(len(strong), int(rng.integers(1, 3))), replace=False)
    direct = float(disks[0, FLAT])
    for i in chosen:
        gain = direct * rng.uniform(1.2, 4.0) / power[i]
        disks[i, [FLAT, ROCK]] *= max(gain, 1.0)
    return replace(pattern, disks=disks)


def stray_light(
    rng: np.random.Generator, frame_shape: tuple[int, int], center: tuple[float, float]
) -> Array:
    """Draw blobs (m, 4) anywhere in the frame that carry up to most of its electrons."""
    size = min(frame_shape)
    count = int(rng.integers(1, 5))
    blobs = np.empty((count, 4))
    blobs[:, :2] = rng.uniform(0, 1, (count, 2)) * frame_shape - np.asarray(center)
    blobs[:, 2] = np.exp(rng.uniform(np.log(0.04), np.log(0.4), count)) * size
    blobs[:, 3] = rng.uniform(0.05, 0.8) * rng.dirichlet(np.ones(count))
    return blobs


def beam_stop(
    rng: np.random.Generator, frame_shape: tuple[int, int], center: tuple[float, float]
) -> NDArray[np.float32]:
    """Draw the shadow of a beam stop over the direct beam: transmission (h, w) from 0 to 1.

    Either a disk on a thin arm or a bar with a straight end; the arm reaches the frame's edge.
    """
    h, w = frame_shape
    size = min(h, w)
    angle = rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:  # most come in along a side
        angle = rng.normal(0, 0.05) + 0.5 * np.pi * rng.integers(4)
    cy, cx = np.asarray(center) + rng.normal(0, 0.01 * size, 2)
    y, x = np.mgrid[:h, :w]
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = np.abs(-(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle))
    softness = rng.uniform(0.3, 1.2)
    if rng.random() < 0.5:
        radius = log_uniform(rng, 0.02, 0.13) * size
        arm = rng.uniform(0.1, 0.8) * radius
        head = expit((radius - np.hypot(along, across)) / softness)
        bar = expit((arm - across) / softness) * (along > 0)
        shade = np.maximum(head, bar)
    else:
        half = log_uniform(rng, 0.012, 0.06) * size
        beyond = rng.uniform(0.5, 3.0) * half
        shade = expit((half - across) / softness) * expit((along + beyond) / softness)
    residual = log_uniform(rng, 1e-4, 0.08)
    return np.asarray(1.0 - (1.0 - residual) * shade, np.float32)
