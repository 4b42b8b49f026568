"""A page of simulated frames, to look at beside measured ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from prenet4d_engines.simulate.detector import Detector, draw_detector, expose
from prenet4d_engines.simulate.difficult import draw_difficult
from prenet4d_engines.simulate.draw import draw_pattern, speckled
from prenet4d_engines.simulate.pattern import KINDS, Pattern
from prenet4d_engines.simulate.render import render

_COLUMNS: Final = 8
_DIFFICULT_ROWS: Final = 3
_DOSES: Final = (1e3, 1e6)
"""Electrons per pattern of the first and the last column, log-uniform between them."""
_INCHES: Final = 1.6
"""A frame's longer side on the page."""
_LEAST_INCHES: Final = 0.6
"""Its shorter one at the least: there must be room for what is written beside it."""
_CAPTION: Final = (
    "Simulated frames, √counts. Red cross: the true center. Above: electrons in a frame. "
    "Every other column of the named kinds: disordered films."
)


def draw_gallery(
    path: Path,
    *,
    frame_shape: tuple[int, int] = (256, 256),
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> None:
    """Draw a page: one row for each kind of pattern, then rows of difficult frames.

    Every other column shows a disordered film, with speckle.

    Brightness is the square root of the counts; a red cross marks the true center. The dose grows
    from left to right.

    Args:
        path: The picture to write; its suffix names the kind.
        frame_shape: (h, w) of the frames.
        seed: Fixes what is drawn.
        on_progress: Told the share done, 0 to 1.

    Raises:
        OSError: The picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if kind != "blank"]
    rows = len(kinds) + _DIFFICULT_ROWS
    h, w = frame_shape
    height, width = (max(_INCHES * side / max(h, w), _LEAST_INCHES) for side in (h, w))
    figure = Figure(figsize=(width * _COLUMNS, height * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(fill(_CAPTION, int(14 * width * _COLUMNS)), fontsize=9)
    axes = figure.subplots(rows, _COLUMNS)
    rng = np.random.default_rng(seed)
    for row in range(rows):
        for column, dose in enumerate(np.geomspace(*_DOSES, _COLUMNS)):
            if row < len(kinds):
                pattern = draw_pattern(rng, frame_shape, kind=kinds[row])
                if column % 2:
                    pattern = speckled(rng, pattern)
                camera = draw_detector(rng, frame_shape, pattern.center)
            else:
                pattern, camera = draw_difficult(rng, frame_shape)
            cell = axes[row, column]
            frame = _frame(pattern, camera, float(dose), rng, frame_shape)
            brightest = float(np.quantile(frame, 0.998))
            cell.imshow(np.sqrt(frame), cmap="gray", vmin=0, vmax=max(brightest, 1.0) ** 0.5)
            if pattern.has_beam:
                cell.plot(pattern.center[1], pattern.center[0], "+", color="red", markersize=4)
            cell.set(xticks=[], yticks=[], xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
            if row == 0:
                cell.set_title(f"{dose:.0e} e", fontsize=8)
            on_progress((row * _COLUMNS + column + 1) / (rows * _COLUMNS))
        axes[row, 0].set_ylabel(kinds[row] if row < len(kinds) else "difficult", fontsize=8)
    figure.savefig(path, dpi=110)


def _frame(
    pattern: Pattern,
    camera: Detector,
    dose: float,
    rng: np.random.Generator,
    frame_shape: tuple[int, int],
) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    frames, _ = expose(render([pattern], frame_shape), dose, camera, generator)
    image: NDArray[np.float32] = frames[0].numpy()
    return image
