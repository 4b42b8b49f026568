"""Classical denoising of one pattern of Poisson counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from prenet4d_engines.evaluate.classical.method import Method

Array = NDArray[np.float64]
Denoise = Callable[..., Array]
"""``denoise(frame (h, w) counts, *setting) -> (h, w) counts``."""


def gaussian(frame: Array, sigma: float) -> Array:
    """Return the frame blurred by a Gaussian of ``sigma`` pixels; counts are kept."""
    blurred: Array = gaussian_filter(frame, sigma, mode="reflect")
    return blurred


def anscombe(counts: Array) -> Array:
    """Return ``2 sqrt(counts + 3/8)``: Poisson noise made nearly Gaussian with sigma 1."""
    return np.asarray(2.0 * np.sqrt(np.maximum(counts, 0.0) + 0.375), np.float64)


def inverse_anscombe(value: Array) -> Array:
    """Return the expectation in counts whose Anscombe transform has the mean ``value``.

    Closed form of the exact unbiased inverse: M. Mäkitalo and A. Foi, IEEE Trans. Image
    Process. 20 (2011) 2697. Values below the transform of zero counts give zero.
    """
    z = np.maximum(value, 2.0 * np.sqrt(0.375))
    root = np.sqrt(1.5)
    counts = z**2 / 4 + root / (4 * z) - 11 / (8 * z**2) + 5 * root / (8 * z**3) - 0.125
    return np.asarray(np.maximum(counts, 0.0), np.float64)


def nonlocal_means(frame: Array, strength: float, bin_width: float) -> Array:
    """Return the frame denoised by non-local means on Anscombe-transformed counts.

    Where there is less than about a count per pixel the Anscombe transform fails and the method
    with it, so, as L. Azzari and A. Foi do (IEEE Signal Process. Lett. 23 (2016) 1086), the
    frame may first be summed over ``bin_width`` pixels and interpolated back afterwards.

    Args:
        frame: Counts, (h, w).
        strength: The filter's ``h`` in units of the noise's sigma.
        bin_width: Pixels summed along each axis before filtering; 1 leaves the frame as it is.
    """
    from skimage.restoration import denoise_nl_means

    def filtered(z: Array) -> Array:
        found = denoise_nl_means(
            z, patch_size=5, patch_distance=6, h=strength, sigma=1.0, fast_mode=True
        )
        return np.asarray(found, np.float64)

    return _on_bins(frame, int(bin_width), filtered)


def bm3d_filter(frame: Array, bin_width: float) -> Array:
    """Return the frame denoised by BM3D on Anscombe-transformed counts, binned as for NLM.

    Args:
        frame: Counts, (h, w).
        bin_width: Pixels summed along each axis before filtering; 1 leaves the frame as it is.
    """
    from bm3d import bm3d

    return _on_bins(frame, int(bin_width), lambda z: np.asarray(bm3d(z, sigma_psd=1.0), np.float64))


def _on_bins(frame: Array, width: int, filtered: Callable[[Array], Array]) -> Array:
    """Filter Anscombe-transformed sums over ``width`` pixels a side and go back to counts."""
    rows, columns = frame.shape
    padded = np.pad(frame, ((0, -rows % width), (0, -columns % width)), mode="reflect")
    shape = (padded.shape[0] // width, width, padded.shape[1] // width, width)
    binned = padded.reshape(shape).sum((1, 3))
    counts = inverse_anscombe(filtered(anscombe(binned))) / width**2
    return _enlarge(counts, width)[:rows, :columns]


def _enlarge(binned: Array, width: int) -> Array:
    """Interpolate bin means linearly back to the pixels they were summed from."""
    if width == 1:
        return binned
    from scipy.ndimage import map_coordinates

    axes = [(np.arange(size * width) - (width - 1) / 2) / width for size in binned.shape]
    grid = np.meshgrid(*axes, indexing="ij")
    return np.asarray(map_coordinates(binned, grid, order=1, mode="nearest"), np.float64)


DENOISE_METHODS: tuple[Method[Denoise], ...] = (
    Method(
        "Gaussian",
        "Gaussian filter, sigma chosen on the truth",
        gaussian,
        tuple((s,) for s in (0.4, 0.55, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)),
    ),
    Method(
        "NLM",
        "A. Buades, B. Coll, J.-M. Morel, CVPR 2005 (scikit-image), on Anscombe-transformed counts",
        nonlocal_means,
        ((0.3, 1), (0.5, 1), (0.8, 1), (0.3, 2), (0.5, 2), (0.8, 2), (0.5, 4), (0.8, 4)),
        needs="skimage",
    ),
    Method(
        "BM3D",
        "K. Dabov et al., IEEE Trans. Image Process. 16 (2007) 2080, on Anscombe-transformed"
        " counts; its package may be used for non-commercial purposes only",
        bm3d_filter,
        ((1,), (2,), (4,)),
        needs="bm3d",
        install="bm3d",
    ),
)
