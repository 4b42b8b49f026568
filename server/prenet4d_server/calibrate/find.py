"""Finding a calibration: from the patterns of a file, or from a service that has found one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import Float32
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.maps import MapAccumulator
from prenet4d_server.wording import counted

if TYPE_CHECKING:
    from prenet4d_client import ControlClient
    from prenet4d_engines.backends import Backend
    from prenet4d_server.files import ScanFile

_BATCH = 32
_ASK_EVERY_S = 0.5
_GOLDEN = (5**0.5 - 1) / 2
Tell = Callable[[float, str], None]
"""Is told how far it is, from 0 to 1, and what to say beside it."""


@dataclass(frozen=True)
class Found:
    """A calibration and what it was read from."""

    calibration: Calibration
    mean: Float32
    """(h, w) the mean of the recentered patterns, before the ellipse is taken out, counts; NaN
    where there is no source."""
    remark: str = ""
    """What to mind about the patterns; empty where nothing."""


def calibrate_file(
    file: ScanFile,
    *,
    most: int = 1024,
    gain: float = 1.0,
    descan: bool = False,
    backend: Backend | None = None,
    tell: Tell = lambda _share, _note: None,
) -> Found:
    """Read the ellipticity of the mean of a file's recentered patterns.

    Values that are negative or no numbers are made counts as ``feeds.above_zero`` does.

    Args:
        file: the scan.
        most: use so many patterns at most, evenly spread over the scan.
        gain: counts per electron.
        descan: keep the fit of the center's drift over the scan, too.
        backend: runs the networks; ``None``: the best that works here.
        tell: is told how far it is.

    Raises:
        CalibrationError: these patterns do not say what the ellipticity is, or, where it was asked
            for, the descan.
        FileError: a frame cannot be read.
    """
    import torch

    from prenet4d_engines.corrector import Corrector
    from prenet4d_engines.reading import read_ellipticity
    from prenet4d_server.feeds import above_zero

    if descan and file.scan_shape is None:
        raise CalibrationError(
            f"The descan of {file.path.name} cannot be fitted, for the shape of its scan is not "
            "known: say it (--scan 64x64)."
        )
    n = min(most, file.n_frames)
    # One of each part: every so many would be the diagonal of a scan of 1024 x 1024.
    parts = np.arange(n + 1) * file.n_frames // n
    chosen = parts[:-1] + (np.arange(n) * _GOLDEN % 1 * np.diff(parts)).astype(np.int64)
    config = CorrectorConfig(averaging_window=max(n, CorrectorConfig().averaging_window))
    corrector = Corrector(
        file.frame_shape,
        scan_shape=file.scan_shape,
        pixel_mask=file.pixel_mask,
        gain=gain,
        config=config,
        backend=backend,
    )
    corrector.freeze()  # all patterns first, one reading of their mean afterwards
    maps = MapAccumulator(file.scan_shape) if file.scan_shape and descan else None
    trusted = np.ones(file.frame_shape, bool) if file.pixel_mask is None else file.pixel_mask
    shown, no_counts, doses = False, 0, []
    for start in range(0, n, _BATCH):
        indices = chosen[start : start + _BATCH]
        frames = _read(file, indices)
        if frames.dtype.kind == "f":
            counts = (frames >= 0) & (frames < np.inf)
            if not counts.all():
                no_counts += int(np.count_nonzero(~counts & trusted))
                frames = above_zero(frames)
        shown = shown or bool((frames > 0).any())
        batch = corrector.process(frames, indices)
        doses.append(batch.dose)
        if maps is not None:
            maps.add(batch)
        tell((start + len(indices)) / n, f"{batch.patterns_averaged} patterns averaged")
    if not shown:
        raise CalibrationError(
            f"{file.path.name} holds no counts: no value of its patterns is above zero. Is it the "
            "right file, and the right dataset in it?"
        )
    mean, averaged = corrector.mean()
    if not averaged:
        raise CalibrationError(
            f"No pattern of {file.path.name} shows a direct beam that can be used: there is "
            "nothing to calibrate from."
        )
    with torch.inference_mode():
        reading = read_ellipticity(
            torch.from_numpy(mean).to(corrector.backend.device),
            corrector.reference_center,
            corrector.backend,
        )
    if not reading.sigma <= config.max_ellipse_sigma:
        raise CalibrationError(
            f"The mean of {counted(averaged, 'pattern')} of {file.path.name} does not show an "
            f"ellipticity: its sigma would be {reading.sigma:.2g}, and "
            f"{config.max_ellipse_sigma:g} is the most that is accepted. Use more patterns, a "
            "higher dose, or a sample with rings or spots."
        )
    fit = maps.descan() if maps is not None else None
    if descan and fit is None:
        raise CalibrationError(
            f"The descan of {file.path.name} cannot be fitted: of the {counted(n, 'pattern')} that "
            "were used, too few show a direct beam, or only some along one line of the scan."
        )
    ratio_sigma, theta_sigma = reading.ellipticity.sigmas(reading.sigma)
    calibration = Calibration(
        ratio=reading.ellipticity.ratio,
        theta=reading.ellipticity.theta,
        ratio_sigma=ratio_sigma,
        theta_sigma=theta_sigma,
        reference_center=corrector.reference_center,
        frame_shape=file.frame_shape,
        detector=str(file.metadata.get("detector", "unknown")),
        patterns=averaged,
        how=f"ellipse network on the mean of patterns of {file.path.name}",
        descan=fit,
    )
    remarks = []
    if no_counts:
        remarks.append(
            f"Mind that {no_counts:,} of {n * np.count_nonzero(trusted):,} values of "
            f"{file.path.name} are negative or no numbers: where most of a pattern is negative, it "
            "is raised until 99 % of it are not; what is negative then, or no number, counts as "
            "zero. A service refuses such frames."
        )
    if (dose := float(np.median(np.concatenate(doses)))) < config.min_dose:
        remarks.append(
            f"Mind that the number of electrons in a pattern of {file.path.name} is {dose:.2g} "
            f"(the median), and fewer than {config.min_dose:g} hardly tell its center. Where the "
            "values are no counts, say what one electron makes (--gain)."
        )
    return Found(calibration, mean, " ".join(remarks))


def calibrate_service(
    client: ControlClient,
    *,
    timeout_s: float,
    descan: bool = False,
    tell: Tell = lambda _share, _note: None,
) -> Found:
    """Wait until a service has found its calibration, and take it.

    Args:
        client: connected to the service.
        timeout_s: wait no longer than this.
        descan: with the fit of the running or the last scan's descan.
        tell: is told how far it is.

    Raises:
        CalibrationError: it has not found one in time, or was frozen before it had.
        Prenet4dError: the service does not answer, or refuses.
    """
    needed = int(client.config()["corrector"]["patterns_to_lock"])
    deadline = time.monotonic() + timeout_s
    while True:
        snapshot = client.snapshot()
        state, averaged = snapshot.result["state"], int(snapshot.result["patterns_averaged"])
        mean = snapshot.arrays.get("mean")
        if state in ("locked", "frozen") and mean is not None:
            calibration = Calibration.from_document(client.save_calibration(descan=descan))
            if _stands_for_nothing(calibration):
                raise CalibrationError(
                    "The service was frozen before it had found an ellipticity: there is none to "
                    "take. Unfreeze it (prenet4d unfreeze) and scan a sample with rings or spots."
                )
            return Found(calibration, np.asarray(mean))
        how = "no acquisition has begun" if state is None else f"it is {state}"
        where = f"{how}, with {averaged} of {needed} patterns"
        if time.monotonic() >= deadline:
            raise CalibrationError(
                f"The service has found no calibration within {timeout_s:g} s: {where}. "
                "Scan a sample with rings or spots, or wait longer (--timeout)."
            )
        tell(min(averaged / needed, 1.0), where)
        time.sleep(_ASK_EVERY_S)


def _stands_for_nothing(calibration: Calibration) -> bool:
    """Whether patterns were averaged and nothing was read from them.

    One that was given has no sigma either, but no patterns of its own.
    """
    return calibration.ratio_sigma is None and calibration.ratio == 1 and calibration.patterns > 0


def _read(file: ScanFile, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    frames = np.empty((len(indices), *file.frame_shape), file.dtype)
    for place, index in enumerate(indices.tolist()):
        file.read_into(index, frames[place : place + 1])
    return frames
