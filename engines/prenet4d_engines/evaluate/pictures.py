"""Pictures to judge by eye: what came in, what came out, what should have, what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Denoised:
    """One pattern before and after.

    Attributes:
        title: What it is.
        noisy: (h, w) counts.
        denoised: (h, w) counts.
        clean: (h, w) expected counts.
    """

    title: str
    noisy: NDArray[np.float32]
    denoised: NDArray[np.float32]
    clean: NDArray[np.float32]


def draw_denoised(pictures: Sequence[Denoised], path: Path) -> None:
    """Write a PNG with a row for each pattern: noisy, denoised, true, and two residuals.

    Counts are shown as square roots, residuals in units of the noise's sigma: that of the denoised
    pattern against the truth, and what was taken away from the noisy one, where structure would be
    structure lost.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = (
        "noisy, √counts",
        "denoised, √counts",
        "expected, √counts",
        "(denoised − expected) / σ\nred −3 to blue +3",
        "(noisy − denoised) / σ\nred −3 to blue +3",
    )
    figure = Figure(figsize=(2.1 * len(columns), 2.1 * len(pictures) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for row, picture in zip(axes, pictures, strict=True):
        brightest = float(np.sqrt(np.quantile(picture.clean, 0.998)))
        noise = np.sqrt(np.maximum(picture.clean, 0.05))
        for cell, image in zip(row, (picture.noisy, picture.denoised, picture.clean), strict=False):
            cell.imshow(np.sqrt(np.maximum(image, 0)), cmap="gray", vmin=0, vmax=brightest)
        for cell, difference in (
            (row[3], picture.denoised - picture.clean),
            (row[4], picture.noisy - picture.denoised),
        ):
            cell.imshow(difference / noise, cmap="RdBu", vmin=-3, vmax=3)
        row[0].set_ylabel(fill(picture.title, 26), fontsize=8)
        for cell in row:
            cell.set(xticks=[], yticks=[])
    for cell, title in zip(axes[0], columns, strict=True):
        cell.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)
