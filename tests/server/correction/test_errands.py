"""What other threads have the pipeline's thread do."""

import threading

import pytest

from prenet4d_engines.errors import EngineError
from prenet4d_server.correction.errands import Errands
from prenet4d_server.errors import CommandFailed
from prenet4d_server.ingest.ring import wait_readable

from ..live import TIMEOUT_S


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
    assert (
        errands.call(threading.current_thread).result(TIMEOUT_S) is not threading.current_thread()
    )


def test_one_that_fails_tells_why_and_stops_nothing(errands):
    def fail() -> None:
        raise EngineError("there is no corrector")

    with pytest.raises(CommandFailed, match="there is no corrector"):
        errands.call(fail).result(TIMEOUT_S)
    assert errands.call(lambda: 1).result(TIMEOUT_S) == 1


def test_a_fault_in_one_is_told_and_stops_nothing(errands, caplog):
    with pytest.raises(CommandFailed, match="its log says why"):
        errands.call(lambda: [][0]).result(TIMEOUT_S)
    assert errands.call(lambda: 1).result(TIMEOUT_S) == 1
    assert "IndexError" in caplog.text


def test_one_that_is_given_up_is_never_done():
    errands, done = Errands(), []
    assert errands.call(lambda: done.append(1)).cancel()
    kept = errands.call(lambda: done.append(2))
    errands.run()
    errands.close()
    kept.result(TIMEOUT_S)
    assert done == [2]


def test_after_the_end_they_are_refused_at_once_and_the_ring_of_the_bell_does_no_harm():
    errands = Errands()
    errands.close()
    with pytest.raises(CommandFailed, match="stopping"):
        errands.call(lambda: 1)
    errands.wake()
