"""Alarms: what the people at the microscope should hear of, in plain words.

Every alarm watches one value against a threshold of the settings. It is raised once, by an event
with its code, when the value reaches the threshold, and cleared once, by an event whose code ends
in ``_cleared``, when the value has fallen to :data:`CLEAR_SHARE` of it, and has stayed there where
it is a count of few frames, which chance alone takes up and down. In between, the alarm stands in
the service's status, in words that follow the value.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_client.messages import Counters, Event, State
from prenet4d_engines.batch import CorrectedBatch, Float32, FrameFlag
from prenet4d_server.config import AlarmSettings
from prenet4d_server.ingest.notices import Details, Level, Started
from prenet4d_server.monitoring.beam_moves import BeamMoves
from prenet4d_server.monitoring.status import AlarmCode, AlarmStatus
from prenet4d_server.wording import counted, foremost

_Int64: TypeAlias = npt.NDArray[np.int64]
_UInt8: TypeAlias = npt.NDArray[np.uint8]

LOOK_EVERY_S = 0.2
CLEAR_SHARE = 0.7
_UNSEEN = 100_000
SHARE_OVER_S = 5.0
"""Shares of flagged and of rejected frames are taken over the last seconds …"""
SHARE_OF_FRAMES = 64
"""… and farther back where fewer frames than these came in them …"""
SHARE_WITHIN_S = 300.0
"""… but not farther than this. Where too few came even so, an alarm stays as it is."""
_FLAGGED = {
    FrameFlag.BLANK: "blank",
    FrameFlag.NO_BEAM: "without a beam",
    FrameFlag.SATURATED: "saturated",
    FrameFlag.LOW_DOSE: "of low dose",
    FrameFlag.OUTLIER: "off the track",
}
"""How the alarm puts each flag; of those that are as frequent, the cause comes before what follows
from it."""
CALM_S = 15.0
"""The share of rejected frames has to stay low for so long, or 2 % of a hundred frames would be
told of every few seconds."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the service knows at one moment."""

    started: Started | None = None
    """The acquisition that is running."""
    state: State | None = None
    patterns_averaged: int = 0
    backlog: int = 0
    """Frames waiting in the ring."""
    silent_s: float = 0.0
    """How long the pipeline has waited for frames in vain."""
    counters: Counters = field(default_factory=Counters)
    """Of the service's life."""
    acquisition: Counters | None = None
    """Of the acquisition that is running."""
    behind_s: Mapping[str, float] = field(default_factory=dict)
    """Lossless receiver → how old the oldest message is that waits for its credit."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One thing that is watched, as it stands."""

    code: AlarmCode
    value: float
    threshold: float
    message: str
    """What to say where the value is too high."""
    cleared: str
    """What to say when it no longer is."""
    subject: str = ""
    """Whom it is about, where there are several."""
    calm_s: float = 0.0
    """How long the value has to stay low until it is told that it is."""
    known: bool = True
    """Where the value says nothing now, the alarm stays as it is."""


@dataclass(frozen=True, slots=True)
class _Tally:
    """How many frames there were up to a moment, and how many of them were bad."""

    time: float
    frames: int = 0
    bad: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)


class Alarms:
    """Watches the service and tells, on a thread of its own: it speaks while all else is held back.

    Args:
        settings: the thresholds.
        patterns_to_lock: how many patterns the calibration needs, to say how far it is.
        tell: takes the events.
    """

    def __init__(
        self, settings: AlarmSettings, *, patterns_to_lock: int, tell: Callable[[Event], None]
    ) -> None:
        self._settings = settings
        self._patterns_to_lock = patterns_to_lock
        self._tell = tell
        self._new: deque[tuple[str, _Int64, Float32, _UInt8]] = deque(maxlen=_UNSEEN)
        self._moves = BeamMoves(settings.center_moved_s, None)
        self._flags = deque([_Tally(0.0)])
        """Of the acquisition's frames; the bad ones are flagged."""
        self._counts = deque([_Tally(0.0)])
        """Of all frames; the bad ones are rejected or shed."""
        self._acquisition_id = ""
        self._unstable_since = 0.0
        self.active: tuple[AlarmStatus, ...] = ()
        """The alarms that stand, oldest first."""
        self._raised: dict[tuple[AlarmCode, str], AlarmStatus] = {}
        self._high: dict[tuple[AlarmCode, str], float] = {}
        """When the value of each that stands was last seen not to be low."""
        self._untold: list[Event] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, facts: Callable[[], Facts]) -> None:
        """Look every fifth of a second at what ``facts`` returns."""

        def watch() -> None:
            while not self._stop.wait(LOOK_EVERY_S):
                self.look(facts(), time.monotonic())

        self._thread = threading.Thread(target=watch, name="alarms", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread looks, or is yet to start."""
        return self._thread is None or self._thread.is_alive()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def see(self, acquisition_id: str, batch: CorrectedBatch) -> None:
        """Take note of a corrected batch; called on the pipeline's thread, which has no time."""
        self._new.append((acquisition_id, batch.indices, batch.tracked, batch.flags))

    def look(self, facts: Facts, now: float) -> None:
        """Raise and clear what the facts, and the batches seen, ask for at this moment."""
        acquisition_id = facts.started.acquisition_id if facts.started else ""
        if acquisition_id != self._acquisition_id:
            self._acquisition_id = acquisition_id
            self._unstable_since = now
            scan_shape = facts.started.scan_shape if facts.started else None
            self._moves = BeamMoves(self._settings.center_moved_s, scan_shape)
            self._flags = deque([_Tally(now)])
            if ("many_flagged", "") in self._raised:
                self._clear(
                    ("many_flagged", ""), "The acquisition whose frames were flagged is over."
                )
        if facts.started is None or facts.state in ("locked", "frozen"):
            self._unstable_since = now
        self._take_in(facts.counters, now)
        readings = {(one.code, one.subject): one for one in self._readings(facts, now)}
        for key, reading in readings.items():
            if not reading.known:
                continue
            if key not in self._raised:
                if reading.value >= reading.threshold:
                    self._raise(key, reading)
                    self._high[key] = now
            elif reading.value >= CLEAR_SHARE * reading.threshold:
                old = self._raised[key]
                self._raised[key] = old.model_copy(
                    update={"message": reading.message, "value": reading.value}
                )
                self._high[key] = now
            elif now - self._high[key] >= reading.calm_s:
                self._clear(key, reading.cleared)
        for key in self._raised.keys() - readings.keys():  # a receiver has left
            self._clear(key, f"Receiver {key[1]!r} is gone, and holds nothing back any more.")
        self.active = tuple(self._raised.values())
        # Only now: who hears of an alarm finds it in the status.
        told, self._untold = self._untold, []
        for event in told:
            self._tell(event)

    def _raise(self, key: tuple[AlarmCode, str], reading: Reading) -> None:
        self._raised[key] = AlarmStatus(
            code=reading.code,
            subject=reading.subject,
            message=reading.message,
            since=time.time(),
            value=reading.value,
            threshold=reading.threshold,
        )
        self._say("warning", reading.code, reading.message, reading)

    def _clear(self, key: tuple[AlarmCode, str], message: str) -> None:
        del self._raised[key], self._high[key]
        self._say("info", f"{key[0]}_cleared", message, None)

    def _say(self, level: Level, code: str, message: str, reading: Reading | None) -> None:
        details: Details = {}
        if reading is not None:
            details = {"value": reading.value, "threshold": reading.threshold}
            details |= {"subject": reading.subject} if reading.subject else {}
        self._untold.append(
            Event(
                level=level,
                code=code,
                message=message,
                acquisition_id=self._acquisition_id,
                details=details,
            )
        )

    # --- what is watched -------------------------------------------------------------------------

    def _readings(self, facts: Facts, now: float) -> Iterator[Reading]:
        """Everything whose threshold is not 0."""
        for reading in (
            self._center(now),
            self._ellipticity(facts, now),
            self._silence(facts),
            self._flagged(),
            self._rejected(),
            self._backlog(facts),
            *self._behind(facts),
        ):
            if reading.threshold > 0:
                yield reading

    def _take_in(self, counters: Counters, now: float) -> None:
        """What the counters say, and what this acquisition's batches since the last look showed."""
        came = []
        while self._new:
            acquisition_id, *figures = self._new.popleft()
            if acquisition_id == self._acquisition_id:
                came.append(figures)
        seen = self._flags[-1]
        frames, flagged, why = seen.frames, seen.bad, seen.reasons
        if came:
            indices, tracked, flags = (np.concatenate(part) for part in zip(*came, strict=True))
            self._moves.see(now, indices, tracked)
            frames += len(flags)
            flagged += int(np.count_nonzero(flags))
            why = {
                reason: why.get(reason, 0) + int(np.count_nonzero(flags & flag))
                for flag, reason in _FLAGGED.items()
            }
        bad = counters.rejected + counters.shed
        self._flags.append(_Tally(now, frames, flagged, why))
        self._counts.append(_Tally(now, counters.received, bad, counters.rejected_by_reason))
        _forget(self._flags, now)
        _forget(self._counts, now)

    def _center(self, now: float) -> Reading:
        moved, over = self._moves.latest(now)
        return Reading(
            "center_moved",
            moved,
            self._settings.center_moved_px,
            f"Beam center moved {moved:.1f} px in {over:.2g} s.",
            "Beam center is steady again.",
        )

    def _ellipticity(self, facts: Facts, now: float) -> Reading:
        have, need = facts.patterns_averaged, self._patterns_to_lock
        if facts.state == "lost":
            why = "it was lost, and is not found again yet"
        elif have < need:
            why = f"{have} of {need} patterns"
        else:
            why = f"its readings still scatter after {have} patterns"
        return Reading(
            "ellipticity_unstable",
            now - self._unstable_since,
            self._settings.ellipticity_s,
            f"Ellipticity not stable yet: {why}.",
            "Ellipticity is no longer waited for: it is stable, or the acquisition is over.",
        )

    def _silence(self, facts: Facts) -> Reading:
        came = facts.acquisition.received if facts.acquisition else 0
        expected = facts.started.expected_frames if facts.started else 0
        silent = facts.silent_s if expected is None or came < expected else 0.0
        return Reading(
            "detector_silent",
            silent,
            self._settings.detector_silent_s,
            f"Detector silent for {silent:.0f} s in mid-acquisition, after "
            f"{counted(came, 'frame')}. Was its scan stopped? The next one ends this one.",
            "The detector sends again, or its acquisition is over.",
        )

    def _flagged(self) -> Reading:
        frames, share, known = _share(self._flags)
        why = _reasons(self._flags).most_common()
        return Reading(
            "many_flagged",
            share,
            self._settings.flagged_share,
            f"{share:.0%} of the last {frames:,} frames are flagged: "
            f"{', '.join(f'{count:,} {reason}' for reason, count in why)}.",
            "Few frames are flagged now, or none come.",
            known=known,
        )

    def _rejected(self) -> Reading:
        came, share, known = _share(self._counts)
        reason = foremost(_reasons(self._counts))
        why = f", most often: {reason}" if reason else ""
        return Reading(
            "many_rejected",
            share,
            self._settings.rejected_share,
            f"{share:.0%} of the last {came:,} frames were rejected or shed{why}.",
            "Few frames are rejected or shed now, or none come.",
            calm_s=CALM_S,
            known=known,
        )

    def _backlog(self, facts: Facts) -> Reading:
        slots = facts.started.slots if facts.started else 0
        share = facts.backlog / slots if slots else 0.0
        return Reading(
            "backlog_high",
            share,
            self._settings.backlog_share,
            f"The ring is filled to {share:.0%}: {facts.backlog} frames wait to be corrected.",
            "The ring has room again.",
        )

    def _behind(self, facts: Facts) -> Iterator[Reading]:
        for name, behind in facts.behind_s.items():
            yield Reading(
                "receiver_behind",
                behind,
                self._settings.receiver_behind_s,
                f"Receiver {name!r} is {behind:.1f} s behind, and holds the service back.",
                f"Receiver {name!r} is no longer behind.",
                subject=name,
            )


def _forget(tallies: deque[_Tally], now: float) -> None:
    """Drop the oldest that the share of bad frames is not taken over any more."""
    last = tallies[-1]
    while tallies[0].time < now - SHARE_OVER_S and (
        tallies[0].time < now - SHARE_WITHIN_S or last.frames - tallies[1].frames >= SHARE_OF_FRAMES
    ):
        tallies.popleft()


def _share(tallies: deque[_Tally]) -> tuple[int, float, bool]:
    """How many frames came, the share of bad ones, and whether they are enough to tell."""
    first, last = tallies[0], tallies[-1]
    frames = last.frames - first.frames
    share = (last.bad - first.bad) / max(frames, 1)
    return frames, share, frames == 0 or frames >= SHARE_OF_FRAMES


def _reasons(tallies: deque[_Tally]) -> Counter[str]:
    """Why frames were bad, and how many of them."""
    return Counter(tallies[-1].reasons) - Counter(tallies[0].reasons)
