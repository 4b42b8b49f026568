"""What is in one diffraction pattern, described before a single pixel exists.

A `Pattern` lists disks, a radial profile and smooth blobs in *ideal* coordinates: pixels relative
to the direct beam, before distortion. `render` turns descriptions into images. Because the
description is analytic, its center and ellipticity are exact. `content` makes crystals, rings and
halos; `draw` draws whole patterns from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Kind = Literal["cbed", "spots", "rings", "grains", "amorphous", "vacuum", "blank"]

KINDS: Final[dict[Kind, float]] = {
    "cbed": 0.46,
    "spots": 0.20,
    "rings": 0.10,
    "grains": 0.10,
    "amorphous": 0.08,
    "vacuum": 0.04,
    "blank": 0.02,
}
"""Content of a pattern and how often training draws it."""

# Columns of Pattern.disks.
Y, X, FLAT, ROCK, RADIUS, EDGE, S0, SY, SX, EPSILON = range(10)
RADIAL_STEP: Final = 0.25
"""Step of the radial profile in pixels."""


@dataclass(frozen=True)
class Pattern:
    """One pattern in ideal coordinates (pixels from the direct beam), and where it lands.

    Attributes:
        kind: What it shows.
        center: Direct beam (cy, cx) in frame pixels; pixel centers at integers.
        ellipticity: (ratio, theta) as everywhere: ratio >= 1, theta in [0, pi).
        disks: (k, 10): y, x, flat amplitude, rocking amplitude, radius, edge width, and the
            two-beam rocking curve s = S0 + SY dy + SX dx (in 1/thickness) with coupling EPSILON
            (thickness / extinction distance).
        radial: Radial intensity profile, sampled every RADIAL_STEP px from 0; empty for none.
        radial_share: Share of the radial profile in what it and the disks carry on the frame.
        blobs: (m, 4): y, x, sigma, electrons in units of what disks and radial profile carry
            together: smooth off-center background.
        floor: Electrons spread evenly over the frame, in the same units.
        bands: (b, 6): Kikuchi bands that modulate the radial profile: normal y and x, middle, half
            width and softness of the edges in px, relative change of the intensity.
        speckle: (k, 4): waves whose sum's squared modulus, 1 in the mean, is the speckle that
            coherent illumination of a disordered sample makes: wave vector y and x in rad/px, real
            and imaginary part of the amplitude.
        speckled: How much of the disks' and of the radial profile's intensity goes as the speckle.
    """

    kind: Kind
    center: tuple[float, float]
    ellipticity: tuple[float, float] = (1.0, 0.0)
    disks: Array = field(default_factory=lambda: np.zeros((0, 10)))
    radial: Array = field(default_factory=lambda: np.zeros(0))
    radial_share: float = 0.0
    blobs: Array = field(default_factory=lambda: np.zeros((0, 4)))
    floor: float = 0.0
    bands: Array = field(default_factory=lambda: np.zeros((0, 6)))
    speckle: Array = field(default_factory=lambda: np.zeros((0, 4)))
    speckled: tuple[float, float] = (0.0, 0.0)

    @property
    def has_beam(self) -> bool:
        """Whether the pattern holds anything that tells where the direct beam is."""
        return self.kind != "blank"

    def moved(self, center: tuple[float, float]) -> Pattern:
        """Return the same pattern with its direct beam elsewhere."""
        return replace(self, center=center)


@dataclass(frozen=True)
class Optics:
    """The instrument behind a pattern: everything that stays the same over a scan.

    Attributes:
        scale: min(h, w) / 256; sizes below are in pixels of the frame itself.
        volts: Accelerating voltage in V.
        pixels_per_inverse_angstrom: Camera length.
        radius: Radius of the convergent-beam disk in pixels.
        edge: Softness of its edge in pixels (about the standard deviation of the blur).
    """

    scale: float
    volts: float
    pixels_per_inverse_angstrom: float
    radius: float
    edge: float
