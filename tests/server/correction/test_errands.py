"""What other threads have the pipeline's thread do."""

import threading

import pytest

from prenet4d_engines.errors import EngineError
from prenet4d_server.correction.errands import Errands
from prenet4d_server.errors import CommandFailed
from prenet4d_server.ingest.ring import wait_readable


@pytest.fixture
def errands():
    made = Errands()
    worked = threading.Event()

    def work() -> None:
        while not worked.is_set():
            wait_readable([made.descriptor], 5.0)
            made.run()
        made.close()

    worker = threading.Thread(target=work)
    worker.start()
    yield made
    worked.set()
    made.wake()
    worker.join()


def test_they_are_done_on_the_other_thread_and_answered(errands):
    assert errands.call(threading.current_thread) is not threading.current_thread()


def test_one_that_fails_tells_why_and_stops_nothing(errands):
    def fail() -> None:
        raise EngineError("there is no corrector")

    with pytest.raises(CommandFailed, match="there is no corrector"):
        errands.call(fail)
    assert errands.call(lambda: 1) == 1


def test_a_fault_in_one_is_told_and_stops_nothing(errands, caplog):
    with pytest.raises(CommandFailed, match="its log says why"):
        errands.call(lambda: [][0])
    assert errands.call(lambda: 1) == 1
    assert "IndexError" in caplog.text


def test_one_that_nobody_does_in_time_is_given_up_and_never_done(monkeypatch):
    monkeypatch.setattr("prenet4d_server.correction.errands.TIMEOUT_S", 0.01)
    errands, done = Errands(), []
    with pytest.raises(CommandFailed, match="busy"):
        errands.call(lambda: done.append(1))
    errands.run()
    errands.close()
    assert done == []


def test_after_the_end_they_are_refused_at_once_and_the_ring_of_the_bell_does_no_harm():
    errands = Errands()
    errands.close()
    with pytest.raises(CommandFailed, match="stopping"):
        errands.call(lambda: 1)
    errands.wake()
