"""The inlet: how the ingest process starts, and what is said where it does not."""

import shutil
import sys
from contextlib import closing

import pytest

from prenet4d_server.errors import IngestDied, ServiceError
from prenet4d_server.ingest.inlet import Inlet

from ..live import settings


def test_a_start_that_takes_too_long_is_not_told_as_a_death(monkeypatch):
    monkeypatch.setattr("prenet4d_server.ingest.inlet.START_TIMEOUT_S", 0.0)
    with closing(Inlet(settings(), on_remark=print)) as inlet:
        with pytest.raises(ServiceError, match=r"not ready after 0 s, and was ended") as caught:
            inlet.open()
        assert not isinstance(caught.value, IngestDied)
        inlet.close()
        assert inlet.pid is None


def test_a_death_at_the_start_is_told_as_one(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # dies before it says anything
    with (
        closing(Inlet(settings(), on_remark=print)) as inlet,
        pytest.raises(IngestDied, match="died at its start"),
    ):
        inlet.open()
