"""Devices that fail in the middle of a scan: batches are done again, and each fault is told."""

import functools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from moments import MomentBackend
from queued import QueuedLanes
from ringscan import BATCHES, CONFIG, SHAPE, parts, rings, together

from prenet4d_engines import Corrector
from prenet4d_engines.batch import CorrectedBatch
from prenet4d_engines.errors import BackendError, FrameError
from prenet4d_engines.recovery import RecoveringCorrector
from prenet4d_engines.stages import Station

CUDA_ERROR = torch.AcceleratorError(
    "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to …"
)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class FailingBackend(MomentBackend):
    """Raises ``error`` at some of its calls."""

    def __init__(self, error: Exception, at: Iterable[int] = (), *, largest: float = np.inf):
        self.error, self.at, self.largest = error, set(at), largest
        self.calls = 0

    def denoise(self, x):
        self.calls += 1
        if self.calls in self.at or len(x) > self.largest:
            raise self.error
        return super().denoise(x)


class FailsOnBrightFrames(MomentBackend):
    def __init__(self, error: Exception):
        self.error = error

    def denoise(self, x):
        if len(x) and x[:, 1].max() > 0.5 * np.log1p(50_000):
            raise self.error
        return super().denoise(x)


class Case:
    def __init__(self, *stations: Station, fallback: bool = False):
        self.told: list[tuple[str, str, str]] = []
        self.stations = list(stations)
        self.corrector = RecoveringCorrector(
            lambda stations: Corrector(SHAPE, config=CONFIG, scan_shape=(9, 10), stations=stations),
            self.stations,
            fallback=(lambda: Station(MomentBackend())) if fallback else None,
            tell=lambda *what: self.told.append(what),
        )

    def run(self, frames, sizes=BATCHES, break_before=-1):
        outcomes = []
        for number, part in enumerate(parts(sizes)):
            if number == break_before:
                self.stations[0].lanes.broken = True
            numbers = np.arange(90)[part]
            outcomes += self.corrector.submit(frames[part], numbers)
            numbers += 1000  # the caller may count on in the same array
        return outcomes + self.corrector.finish()

    @property
    def codes(self):
        return [code for _, code, _ in self.told]


def device(backend=None) -> Station:
    return Station(backend or MomentBackend(), QueuedLanes())


@functools.cache
def undisturbed(sizes=BATCHES):
    return Case(device()).run(rings(), sizes)


def assert_nothing_lost(outcomes, wanted):
    """Every frame once, in order, and tracked as if nothing had been."""
    assert all(isinstance(outcome, CorrectedBatch) for outcome in outcomes), outcomes
    found, expected = together(outcomes), together(wanted)
    for name in ("indices", "dose", "flags", "center", "tracked", "tracked_sigma"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("call", [1, 13, 23])
@pytest.mark.parametrize("kind", [QueuedLanes, None])
def test_what_was_under_way_when_the_device_failed_is_done_again(call, kind):
    frames = rings()
    station = Station(FailingBackend(CUDA_ERROR, [call]), kind and kind())
    case = Case(station)
    outcomes = case.run(frames)
    assert_nothing_lost(outcomes, undisturbed())
    expected = ["corrector_rebuilt"] if station.backend.calls >= call else []
    assert case.codes == expected
    for level, _, message in case.told:
        assert level == "warning"
        assert "(CUDA error: unspecified launch failure)" in message
        assert "frames are done again" in message


def test_the_calibration_survives():
    frames = rings()
    case = Case(device(FailingBackend(CUDA_ERROR, [24])))
    outcomes = case.run(frames)
    assert case.codes == ["corrector_rebuilt"]
    assert outcomes[3].state == "locked"
    assert {outcome.state for outcome in outcomes[3:]} == {"locked"}
    vectors = [outcome.ellipticity.vector for outcome in outcomes[3:]]
    np.testing.assert_allclose(vectors, [vectors[0]] * len(vectors), atol=0.01)


def test_what_the_operator_chose_survives():
    frames = rings()
    case = Case(device(FailingBackend(CUDA_ERROR, [24])))
    case.corrector.set_reference_center((20.0, 30.0))
    case.corrector.freeze()
    outcomes = case.run(frames)
    assert case.codes == ["corrector_rebuilt"]
    assert outcomes[-1].reference_center == (20.0, 30.0)
    assert outcomes[-1].state == "frozen"
    case.corrector.unfreeze()
    assert case.corrector.state != "frozen"


@pytest.mark.parametrize("command", ["freeze", "recalibrate", "load"])
def test_what_the_operator_commanded_while_batches_were_under_way_survives(command):
    frames, case = rings(), Case(device())
    corrector = case.corrector
    for part in parts((10,) * 6):
        corrector.submit(frames[part], np.arange(90)[part])
    if command == "load":
        corrector.load(corrector.calibration().model_copy(update={"ratio": 1.2, "theta": 0.3}))
    else:
        getattr(corrector, command)()
    state, ratio = corrector.state, corrector.calibration().ratio
    assert (state == "calibrating") == (command == "recalibrate")
    case.stations[0].lanes.fault = CUDA_ERROR
    corrector.submit(frames[60:70], np.arange(60, 70))
    assert case.codes == ["corrector_rebuilt"]
    assert corrector.state == state
    if command != "recalibrate":  # which has been found anew since
        assert corrector.calibration().ratio == pytest.approx(ratio, abs=1e-6)


def test_too_little_memory_makes_batches_smaller_and_says_so():
    frames = rings()
    case = Case(device(FailingBackend(NO_MEMORY, largest=2)))  # a call gets half of a slot
    outcomes = case.run(frames)
    assert_nothing_lost(outcomes, undisturbed())
    assert case.codes == ["smaller_batches"] * 2
    assert "8 are used from now on" in case.told[0][2]
    assert "4 are used from now on" in case.told[1][2]
    assert case.stations[0].most == 4


class Activations:
    """Memory of a device that has so much, for as long as somebody holds this."""

    held = 0

    def __init__(self, size: int, room: float):
        self.size = 0
        if Activations.held + size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.size = size
        Activations.held += size

    def __del__(self):
        Activations.held -= self.size


class SmallBackend(MomentBackend):
    """Needs room for two layers of a batch, all of it in one part."""

    def __init__(self, room: float):
        self.room = room

    def spread(self, work, n):
        return [work(slice(0, n))]

    def denoise(self, x):
        layers = [Activations(len(x), self.room)]
        layers.append(Activations(len(x), self.room))
        return super().denoise(x)


def test_what_a_failed_attempt_held_is_let_go_of_before_a_smaller_one():
    frames = rings()
    case = Case(device(SmallBackend(room=17)))  # 16 frames fail with 16 of them held
    assert_nothing_lost(case.run(frames, (16, 16)), undisturbed((16, 16)))
    assert case.codes == ["smaller_batches"]
    assert case.stations[0].most == 8


@pytest.mark.parametrize("sizes", [(16, 16), (4, 1, 16, 4)])
def test_a_device_short_of_memory_takes_none_of_the_others_along(sizes):
    small, large = device(SmallBackend(room=17)), device(SmallBackend(room=np.inf))
    case = Case(small, large)
    assert_nothing_lost(case.run(rings(), sizes), undisturbed(sizes))
    assert case.codes == ["smaller_batches"]
    assert case.stations == [small, large]
    assert (small.most, large.most) == (8, None)


def test_too_little_memory_for_a_single_frame_is_the_end_of_a_device():
    frames = rings()
    case = Case(device(FailingBackend(NO_MEMORY, largest=0)), fallback=True)
    assert_nothing_lost(case.run(frames, (16, 16)), undisturbed((16, 16)))
    assert case.codes[-1] == "cpu_fallback"


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_cpu_goes_on_where_the_user_allows_it(number):
    frames = rings()
    case = Case(device(), fallback=True)
    outcomes = case.run(frames, break_before=number)
    assert_nothing_lost(outcomes, undisturbed())
    assert case.codes == ["cpu_fallback"]
    assert "illegal memory access" in case.told[0][2]
    assert not case.stations[0].lanes.keeps


def test_where_nothing_may_take_over_batches_fail_and_the_reason_is_told_once():
    frames = rings()
    case = Case(device())
    outcomes = case.run(frames, break_before=6)
    assert len(outcomes) == len(BATCHES)
    failed = [isinstance(outcome, BackendError) for outcome in outcomes]
    assert failed == sorted(failed)
    assert sum(failed) >= 2
    assert case.codes == ["gpu_failed"]
    assert "Start the service again" in case.told[0][2]
    assert case.stations == []
    mean, patterns = case.corrector.mean()
    assert (mean.shape, patterns) == (SHAPE, 0)
    assert case.corrector.state == "locked"
    assert case.corrector.calibration().ratio > 1.02
    with pytest.raises(BackendError, match="Start the service again"):
        case.corrector.recalibrate()
    assert case.codes == ["gpu_failed"]


def test_the_other_devices_go_on():
    frames = rings()
    case = Case(device(), device())
    assert_nothing_lost(case.run(frames, break_before=3), undisturbed())
    assert case.codes == ["corrector_rebuilt"]
    assert len(case.stations) == 1


DEVICE_ERROR = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
BUGS = [
    ValueError("shapes (3,2) and (5,) not aligned"),
    ZeroDivisionError("by zero"),
    KeyError("x"),
]


@pytest.mark.parametrize("error", [DEVICE_ERROR, *BUGS], ids=lambda error: type(error).__name__)
def test_a_batch_that_fails_by_itself_is_the_only_one_that_does(error):
    frames = rings()
    frames[40, 3, 3] = 65_000
    case = Case(device(FailsOnBrightFrames(error)))
    outcomes = case.run(frames, (16,) * 5)
    assert [outcome is error for outcome in outcomes] == [number == 2 for number in range(5)]
    rest = np.r_[0:32, 48:80]
    found = [outcome for outcome in outcomes if isinstance(outcome, CorrectedBatch)]
    np.testing.assert_array_equal(together(found)["indices"], rest)


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_a_fault_in_the_program_is_not_taken_for_the_devices(error, caplog):
    frames = rings()
    frames[40, 3, 3] = 65_000
    case = Case(device(FailsOnBrightFrames(error)), fallback=True)
    (own,) = case.stations
    case.run(frames, (16,) * 5)
    assert case.stations == [own]
    assert set(case.codes) == {"corrector_fault"}
    for level, _, message in case.told:
        assert level == "error"
        assert f"by a fault in the program ({type(error).__name__}: " in message
    assert "Traceback" in caplog.text


def test_a_fault_in_the_program_that_does_not_come_again_loses_nothing(caplog):
    case = Case(device(FailingBackend(BUGS[0], [13])))
    assert_nothing_lost(case.run(rings()), undisturbed())
    assert case.codes == ["corrector_fault"]
    assert "frames are done again" in case.told[0][2]
    assert "Traceback" in caplog.text


def test_a_command_that_fails_by_a_fault_in_the_program_changes_nothing():
    frames = rings()
    case = Case(device())
    outcomes = []
    for part in parts((16, 16)):
        outcomes += case.corrector.submit(frames[part], np.arange(90)[part])
    case.stations[0].lanes.fault = BUGS[0]
    with pytest.raises(ValueError, match="not aligned"):
        case.corrector.mean()
    assert_nothing_lost(outcomes + case.corrector.finish(), undisturbed((16, 16)))
    assert case.told == []


def test_wrong_frames_are_refused_in_their_turn():
    frames = rings()
    case = Case(device())
    assert case.corrector.submit(frames[:8], np.arange(8)) == []
    outcomes = case.corrector.submit(frames[8:16, :5], np.arange(8, 16))
    outcomes += case.corrector.submit(frames[16:24], np.arange(16, 24))
    outcomes += case.corrector.finish()
    assert [type(outcome) for outcome in outcomes] == [CorrectedBatch, FrameError, CorrectedBatch]
    assert case.told == []
    with pytest.raises(FrameError, match="Frames come as"):
        case.corrector.process(frames[:8, :5], np.arange(8))


@pytest.mark.parametrize("command", ["freeze", "mean"])
def test_commands_find_a_device_that_failed(command):
    frames = rings()
    case = Case(device(), fallback=True)
    outcomes = []
    for part in parts((16, 16, 16)):
        outcomes += case.corrector.submit(frames[part], np.arange(90)[part])
    case.stations[0].lanes.broken = True
    getattr(case.corrector, command)()
    outcomes += case.corrector.finish()
    assert case.codes == ["cpu_fallback"]
    assert_nothing_lost(outcomes, undisturbed((16, 16, 16)))
