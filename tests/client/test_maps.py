"""``ScanMaps`` against a real XPUB and a real ROUTER socket: what is missing is asked for."""

import contextlib
import threading

import numpy as np
import pytest
import zmq

from prenet4d_client import InvalidUse, NoAnswer, OversizeMessage, ScanMaps, decode, encode
from prenet4d_client.messages import ControlReply, Maps

from .conftest import PATIENCE_S

NAMES = ("bright_field", "com_y")


class MapService:
    """Fills in scan maps one rectangle at a time, publishes each, and hands out the whole."""

    def __init__(self, bind, publisher="p1"):
        self.stream, self.control = bind(zmq.XPUB), bind(zmq.ROUTER)
        self.publisher = publisher
        self.asked = 0
        self.silent = False
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.begin("scan-1", (4, 6))
        self.sequence = -1
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def begin(self, acquisition_id, scan_shape):
        self.acquisition_id, self.scan_shape = acquisition_id, scan_shape
        self.values = np.full((len(NAMES), *scan_shape), np.nan, np.float32)

    def header(self, region):
        return Maps(
            publisher=self.publisher,
            acquisition_id=self.acquisition_id,
            sequence=self.sequence,
            scan_shape=self.scan_shape,
            names=NAMES,
            region=region,
            frames=int(np.isfinite(self.values[0]).sum()),
        )

    def fill(self, region, value, *, lost=False):
        y0, x0, height, width = region
        with self._lock:
            part = self.values[:, y0 : y0 + height, x0 : x0 + width]
            part[0], part[1] = value, -value
            self.sequence += 1
            if not lost:
                parts = encode(self.header(region), {"values": part})
                self.stream.socket.send_multipart(parts)

    def await_subscriber(self):
        assert self.stream.socket.recv() == b"\x01maps"

    def _answer(self):
        while not self._stopping.is_set():
            if self.control.socket.poll(20) and not self.silent:
                identity, *parts = self.control.socket.recv_multipart()
                request = decode(parts)
                with self._lock:
                    answer = self._whole(request)
                    self.asked += 1
                self.control.socket.send_multipart([identity, *answer])

    def _whole(self, request):
        assert request.command == "maps"
        told = {"publisher": self.publisher, "sequence": request.sequence}
        if self.sequence < 0:
            return encode(ControlReply(ok=False, error="No acquisition has begun yet.", **told))
        if request.arguments["newer_than"] == [self.publisher, self.sequence]:
            return encode(ControlReply(ok=True, **told))
        result = self.header((0, 0, *self.scan_shape)).model_dump()
        return encode(ControlReply(ok=True, result=result, **told), {"values": self.values})

    def close(self):
        self._stopping.set()
        self._thread.join()


@pytest.fixture
def service(bind):
    with contextlib.closing(MapService(bind)) as made:
        yield made


@pytest.fixture
def _patient(monkeypatch):
    """Nothing is asked again because it has been quiet for a while."""
    for wait in ("_QUIET_S", "_ANSWER_S"):
        monkeypatch.setattr(f"prenet4d_client.maps.{wait}", PATIENCE_S)


@contextlib.contextmanager
def following(service, **options):
    addresses = service.stream.address, service.control.address
    with ScanMaps(*addresses, **({"timeout": PATIENCE_S} | options)) as maps:
        service.await_subscriber()
        yield maps


def agrees(maps, service):
    for name, values in zip(NAMES, service.values, strict=True):
        np.testing.assert_array_equal(maps[name], values)


def next_at_last(maps):
    while True:
        with contextlib.suppress(NoAnswer):
            return next(maps)


def test_there_are_none_before_the_first_update(service):
    with following(service) as maps:
        assert (maps.names, maps.latest) == ((), None)
        with pytest.raises(KeyError, match="'bright_field'; there are none before the first"):
            maps["bright_field"]


@pytest.mark.usefixtures("_patient")
def test_who_comes_late_gets_what_was_before_and_then_what_changes(service):
    service.fill((0, 0, 1, 6), 1)
    with following(service) as maps:
        first = next(maps)
        assert (first.region, first.frames, maps.names) == ((0, 0, 4, 6), 6, NAMES)
        with pytest.raises(KeyError, match=f"no map 'bf'; there are {', '.join(NAMES)}"):
            maps["bf"]
        agrees(maps, service)
        service.fill((1, 0, 2, 3), 2)
        assert next(maps).region == (1, 0, 2, 3)
        agrees(maps, service)
        assert service.asked == 1
        with pytest.raises(KeyError):
            maps["phase"]


def test_updates_that_the_whole_maps_held_already_are_left_out(service):
    with following(service) as maps:
        service.fill((0, 0, 1, 6), 1)
        service.fill((1, 0, 1, 6), 2)
        assert next(maps).sequence == 1
        service.fill((2, 0, 1, 6), 3)
        assert next(maps).sequence == 2
        agrees(maps, service)


@pytest.mark.usefixtures("_patient")
def test_a_gap_is_filled_by_asking(service):
    service.fill((0, 0, 1, 6), 1)
    with following(service) as maps:
        next(maps)
        service.fill((1, 0, 1, 6), 2, lost=True)
        service.fill((2, 0, 1, 6), 3)
        assert next(maps).region == (0, 0, 4, 6)
        agrees(maps, service)
        service.fill((3, 0, 1, 6), 4)
        assert next(maps).region == (3, 0, 1, 6)
        agrees(maps, service)
        assert service.asked == 2


def test_the_last_update_is_not_missed_either(service):
    service.fill((0, 0, 1, 6), 1)
    with following(service) as maps:
        next(maps)
        service.fill((1, 0, 3, 6), 2, lost=True)
        assert next(maps).frames == 24
        agrees(maps, service)


@pytest.mark.usefixtures("_patient")
def test_a_new_acquisition_brings_new_maps(service):
    service.fill((0, 0, 4, 6), 1)
    with following(service) as maps:
        next(maps)
        kept = maps["bright_field"]
        service.begin("scan-2", (2, 3))
        service.fill((0, 1, 1, 2), 5)
        assert next(maps).acquisition_id == "scan-2"
        agrees(maps, service)
        assert (kept == 1).all()
        assert service.asked == 1


def test_a_service_that_was_started_again_is_asked(service, bind):
    service.fill((0, 0, 1, 6), 1)
    with following(service) as maps:
        next(maps)
        service.begin("scan-9", (4, 6))
        service.publisher, service.sequence = "p2", -1
        service.fill((0, 0, 1, 6), 7, lost=True)
        service.fill((1, 0, 1, 6), 8)
        assert next(maps).acquisition_id == "scan-9"
        agrees(maps, service)


def test_no_maps_yet_is_waited_for_and_silence_is_told(service, monkeypatch):
    monkeypatch.setattr("prenet4d_client.maps.LEAST_ANSWER_S", PATIENCE_S)
    with following(service, timeout=0.3) as maps:
        with pytest.raises(NoAnswer, match="No acquisition has begun yet"):
            next(maps)
        service.fill((0, 0, 1, 6), 1)
        next_at_last(maps)
        agrees(maps, service)


def test_they_can_be_asked_for_without_waiting(service):
    service.fill((0, 0, 2, 6), 1.0)
    with following(service, timeout=0) as maps:
        assert next_at_last(maps).frames == 12
        with pytest.raises(NoAnswer, match=r"within 0 s\. .* is a scan running"):
            next(maps)


def test_a_control_socket_that_does_not_answer_is_asked_again(service):
    service.silent = True
    service.fill((0, 0, 1, 6), 1)
    with following(service, timeout=0.2) as maps:
        with pytest.raises(NoAnswer, match=r"No service answered 'maps' .* its control address"):
            next(maps)
        service.silent = False
        next_at_last(maps)
        agrees(maps, service)


def test_maps_larger_than_allowed_are_told(service):
    service.fill((0, 0, 1, 6), 1)
    with following(service, max_bytes=1000) as maps:
        next(maps)
        service.begin("scan-2", (100, 100))
        service.fill((0, 0, 1, 1), 1)
        with pytest.raises(OversizeMessage, match="at most 1000"):
            next(maps)


def test_the_maps_cannot_be_changed_by_who_reads_them(service):
    service.fill((0, 0, 1, 6), 1)
    with following(service) as maps:
        next(maps)
        with pytest.raises(ValueError, match="read-only"):
            maps["com_y"][0, 0] = 3


def test_maps_that_are_closed_say_so(nobody):
    maps = ScanMaps(nobody, nobody)
    maps.close()
    maps.close()
    with pytest.raises(InvalidUse, match="This ScanMaps is closed"):
        next(maps)
