"""Simulated diffraction: real crystals, exact geometry, honest cameras.

`draw_pattern` describes, `render` draws, `expose` takes frames; `simulate_scan` and `draw_scan`
give whole scans whose truth is known.
"""

from prenet4d_engines.simulate.detector import (
    Detector,
    draw_detector,
    draw_dose,
    expected_counts,
    expose,
    filled,
    ideal_detector,
)
from prenet4d_engines.simulate.difficult import (
    draw_difficult,
    draw_wide_beam,
    draw_without_beam,
)
from prenet4d_engines.simulate.draw import (
    draw_center,
    draw_ellipticity,
    draw_optics,
    draw_pattern,
    speckled,
)
from prenet4d_engines.simulate.gallery import draw_gallery
from prenet4d_engines.simulate.materials import (
    HELD_OUT,
    TRAINING,
    Material,
    relatives,
)
from prenet4d_engines.simulate.multislice import Multislice
from prenet4d_engines.simulate.pattern import KINDS, Kind, Optics, Pattern
from prenet4d_engines.simulate.render import distortion, render
from prenet4d_engines.simulate.scan import Drift, Scan, draw_scan, simulate_scan

__all__ = [
    "HELD_OUT",
    "KINDS",
    "TRAINING",
    "Detector",
    "Drift",
    "Kind",
    "Material",
    "Multislice",
    "Optics",
    "Pattern",
    "Scan",
    "distortion",
    "draw_center",
    "draw_detector",
    "draw_difficult",
    "draw_dose",
    "draw_ellipticity",
    "draw_gallery",
    "draw_optics",
    "draw_pattern",
    "draw_scan",
    "draw_wide_beam",
    "draw_without_beam",
    "expected_counts",
    "expose",
    "filled",
    "ideal_detector",
    "relatives",
    "render",
    "simulate_scan",
    "speckled",
]
