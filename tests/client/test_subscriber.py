"""``Subscriber`` against a real XPUB socket."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import threading

import msgpack
import numpy as np
import pytest
import zmq

from prenet4d_client import InvalidUse, NoAnswer, Subscriber, encode

from .conftest import PATIENCE_S
from .examples import EXAMPLES


class Publisher:
    """Publishes the examples as the service would, and waits for subscribers instead of hoping."""

    def __init__(self, bind, endpoint="tcp://127.0.0.1:*", name="p1", **options):
        self.bound = bind(zmq.XPUB, endpoint, **options)
        self.address = self.bound.address
        self.name = name
        self.sequences = {}

    def await_subscriptions(self, *topics):
        told = {self.bound.socket.recv() for _ in topics}
        assert told == {b"\x01" + topic.encode() for topic in topics}

    def publish(self, kind="event", *, skip=0, **changes):
        header, arrays = EXAMPLES[kind]
        sequence = self.sequences.get(kind, 0) + skip
        self.sequences[kind] = sequence + 1
        update = {"publisher": self.name, "sequence": sequence} | changes
        self.bound.socket.send_multipart(encode(header.model_copy(update=update), arrays))


@pytest.fixture
def publisher(bind):
    return Publisher(bind)


@contextlib.contextmanager
def subscribed(publisher, topics, **options):
    with Subscriber(publisher.address, topics, **({"timeout": PATIENCE_S} | options)) as stream:
        publisher.await_subscriptions(*stream.topics)
        yield stream


def test_messages_come_with_their_fields_and_arrays(publisher):
    with subscribed(publisher, ("telemetry", "corrected")) as stream:
        publisher.publish("telemetry")
        publisher.publish("corrected")
        telemetry, corrected = next(stream), next(stream)
    assert telemetry.ellipticity.ratio == 1.03
    assert telemetry.state == "locked"
    np.testing.assert_array_equal(telemetry.tracked, EXAMPLES["telemetry"][1]["tracked"])
    assert corrected.indices.tolist() == [4, 5, 9]
    assert np.isnan(corrected.patterns[:, 0, 0]).all()


def test_only_the_topics_asked_for_come(publisher):
    with subscribed(publisher, "mean") as stream:
        for kind in ("telemetry", "event", "mean"):
            publisher.publish(kind)
        assert next(stream).type == "mean"
        assert stream.missed == 0


@pytest.mark.parametrize("topics", ["telemtry", None, 5, (), ("event", ""), "frames", ["register"]])
def test_a_topic_that_is_never_published_is_refused(nobody, topics):
    with pytest.raises(InvalidUse, match="choose from telemetry, corrected"):
        Subscriber(nobody, topics)


@pytest.mark.parametrize("queue", [0, -1, 1 << 31, 1.5, "5"])
def test_a_queue_that_is_none_is_refused(nobody, queue):
    with pytest.raises(InvalidUse, match=f"queue is {queue!r}; it must be a whole number"):
        Subscriber(nobody, queue=queue)


def test_a_queue_may_be_a_number_of_numpy(publisher):
    with subscribed(publisher, "event", queue=np.int64(5)) as stream:
        publisher.publish("event")
        assert stream.receive().sequence == 0


def test_missed_messages_are_told_and_counted(publisher):
    with subscribed(publisher, ("event", "mean")) as stream:
        publisher.publish("event", skip=7)  # it came late: that is no gap
        publisher.publish("event")
        publisher.publish("event", skip=3)
        publisher.publish("mean")
        publisher.publish("event")
        publisher.publish("mean", skip=2)
        assert [next(stream).gap for _ in range(6)] == [0, 0, 3, 0, 0, 2]
        assert stream.missed == 5


def test_a_slow_subscriber_learns_how_much_it_missed(bind):
    publisher = Publisher(bind, sndhwm=2, sndbuf=4096)
    header, arrays = EXAMPLES["mean"][0], {"mean": np.zeros((128, 128), np.float32)}

    def publish(sequence):
        update = {"publisher": "p1", "sequence": sequence}
        publisher.bound.socket.send_multipart(encode(header.model_copy(update=update), arrays))

    with subscribed(publisher, "mean", queue=2) as stream:
        publish(0)
        came = [next(stream).sequence]
        for sequence in range(1, 300):
            publish(sequence)
        while came[-1] < 300:  # the first that finds room again
            sequence += 1
            publish(sequence)
            while stream._socket.poll(20):
                came.append(next(stream).sequence)
    assert stream.missed > 0
    assert stream.missed + len(came) == came[-1] + 1


def test_it_reconnects_when_the_service_starts_again_and_that_is_no_gap(bind):
    first = Publisher(bind)
    with subscribed(first, "event") as stream:
        first.publish("event", skip=5)
        assert next(stream).sequence == 5
        first.bound.close()

        def start_again():
            second = Publisher(bind, first.address, name="p2")
            second.await_subscriptions("event")  # which the stream sends again while it waits
            second.publish("event", skip=9)

        service = threading.Thread(target=start_again)
        service.start()
        message = next(stream)
        service.join()
    assert (message.publisher, message.sequence, message.gap) == ("p2", 9, 0)
    assert stream.missed == 0


def test_bad_messages_are_skipped_logged_and_counted(publisher, caplog):
    caplog.set_level(logging.WARNING)
    with subscribed(publisher, "event") as stream:
        send = publisher.bound.socket.send_multipart
        send([b"event"])
        send([b"event", b"\xc1"])
        send([b"eventually", *encode(*EXAMPLES["event"])[1:]])
        publisher.publish("event")
        assert next(stream).type == "event"
    assert stream.bad == 3
    assert [r.name for r in caplog.records] == ["prenet4d_client.subscriber"] * 3
    assert "at least 2 parts" in caplog.text


def test_a_message_larger_than_allowed_is_skipped(publisher):
    with subscribed(publisher, ("mean", "event"), max_bytes=400) as stream:
        publisher.publish("mean")
        publisher.publish("event")
        assert next(stream).type == "event"
    assert stream.bad == 1


def test_silence_is_told(nobody):
    with (
        Subscriber(nobody, timeout=0.1) as stream,
        pytest.raises(NoAnswer, match=r"within 0\.1 s on telemetry: is the service running"),
    ):
        next(stream)


def test_bad_messages_do_not_count_as_an_answer(publisher):
    with Subscriber(publisher.address, "event", timeout=0.3) as stream:
        publisher.await_subscriptions("event")
        publisher.bound.socket.send_multipart([b"event", b"?"])
        assert stream._socket.poll(1000 * PATIENCE_S)
        with pytest.raises(NoAnswer, match=r"Skipped: 1; of the last one: This is not a prenet4d"):
            next(stream)
        with pytest.raises(NoAnswer, match="is the service running"):
            next(stream)
    assert stream.bad == 1


def test_a_service_of_another_version_is_named_once(publisher, caplog):
    caplog.set_level(logging.WARNING)
    of_tomorrow = msgpack.packb({"protocol": "prenet4d", "version": 2, "type": "event"})
    with subscribed(publisher, "event") as stream:
        for _ in range(5):
            publisher.bound.socket.send_multipart([b"event", of_tomorrow])
        publisher.publish("event")
        assert next(stream).type == "event"
    assert stream.bad == 5
    assert len(caplog.records) == 1
    assert "protocol version 2; this package speaks 1" in caplog.text


def test_a_closed_subscriber_says_so(nobody):
    stream = Subscriber(nobody)
    stream.close()
    stream.close()
    with pytest.raises(InvalidUse, match="is closed"):
        next(stream)


def test_one_that_another_thread_has_closed_while_it_waits_says_so(nobody, monkeypatch):
    stream = Subscriber(nobody)
    poll = zmq.Socket.poll

    def closed_between_two_waits(socket, milliseconds):
        closing = threading.Thread(target=stream.close)
        closing.start()
        closing.join()
        return poll(socket, milliseconds)

    monkeypatch.setattr(zmq.Socket, "poll", closed_between_two_waits)
    with pytest.raises(InvalidUse, match="This Subscriber is closed"):
        stream.receive()


def test_a_subscriber_that_was_closed_after_it_waited_in_asyncio_says_so(nobody):
    async def wait_and_close():
        async with Subscriber(nobody, timeout=0.01) as stream:
            with pytest.raises(NoAnswer):
                await stream.receive_async()
        with pytest.raises(InvalidUse, match="is closed"):
            await stream.receive_async()

    asyncio.run(wait_and_close())


def test_one_that_is_forgotten_in_a_cycle_does_not_stop_the_program(nobody):
    forget = (
        "import gc; from prenet4d_client import Subscriber\n"
        f"cycle = [Subscriber({nobody!r})]; cycle.append(cycle); del cycle; gc.collect()"
    )
    subprocess.run([sys.executable, "-c", forget], check=True)


# --- asyncio -------------------------------------------------------------------------------------


def test_async_for(publisher):
    async def collect():
        async with Subscriber(
            publisher.address, ("event", "corrected"), timeout=PATIENCE_S
        ) as stream:
            publisher.await_subscriptions("event", "corrected")
            publisher.publish("event")
            publisher.publish("corrected", skip=0)
            publisher.publish("corrected", skip=4)
            got = []
            async for message in stream:
                got.append((message.type, message.gap))
                if len(got) == 3:
                    return got, stream.missed
        return None

    assert asyncio.run(collect()) == ([("event", 0), ("corrected", 0), ("corrected", 4)], 4)


def test_async_messages_that_come_while_waiting(publisher):
    async def collect():
        async with Subscriber(publisher.address, "event", timeout=PATIENCE_S) as stream:
            publisher.await_subscriptions("event")
            loop = asyncio.get_running_loop()
            for k in range(20):
                loop.call_later(0.005 * k, publisher.publish, "event")
            return [(await anext(stream)).sequence for _ in range(20)]

    assert asyncio.run(collect()) == list(range(20))


def test_async_waiting_lets_others_run_and_can_be_cancelled(publisher):
    async def main():
        async with Subscriber(publisher.address, "event") as stream:
            publisher.await_subscriptions("event")
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            publisher.publish("event")
            return await asyncio.wait_for(anext(stream), PATIENCE_S)

    assert asyncio.run(main()).sequence == 0


def test_async_tasks_take_turns_at_the_messages(publisher):
    async def main():
        async with Subscriber(publisher.address, "event", timeout=PATIENCE_S) as stream:
            publisher.await_subscriptions("event")
            tasks = [asyncio.create_task(stream.receive_async()) for _ in range(3)]
            for _ in tasks:
                await asyncio.sleep(0.05)
                publisher.publish("event")
            return await asyncio.gather(*tasks)

    assert sorted(message.sequence for message in asyncio.run(main())) == [0, 1, 2]


def test_async_waiting_for_one_that_is_closed_ends_and_says_so(nobody):
    async def main():
        stream = Subscriber(nobody)
        waiting = asyncio.create_task(stream.receive_async())
        await asyncio.sleep(0.05)
        stream.close()
        with pytest.raises(InvalidUse, match="This Subscriber is closed"):
            await waiting

    asyncio.run(main())


def test_async_waiting_for_one_that_another_task_has_closed_ends_and_says_so(publisher):
    async def main():
        stream = Subscriber(publisher.address, "event", timeout=PATIENCE_S)
        publisher.await_subscriptions("event")

        async def take_one():
            await stream.receive_async()
            stream.close()

        tasks = [asyncio.create_task(take_one()) for _ in range(3)]
        await asyncio.sleep(0.05)
        publisher.publish("event")
        publisher.publish("event")
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = [str(end) for end in asyncio.run(main())]
    assert sorted(ends) == ["None"] + 2 * ["This Subscriber is closed: make a new one."]


def test_async_waiting_that_is_cancelled_and_closed_is_cancelled(nobody):
    async def main():
        stream = Subscriber(nobody)
        waiting = asyncio.create_task(stream.receive_async())
        await asyncio.sleep(0.05)
        waiting.cancel()
        stream.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


def test_async_silence_is_told(nobody):
    async def main():
        async with Subscriber(nobody, timeout=0.1) as stream:
            await anext(stream)

    with pytest.raises(NoAnswer, match="is the service running"):
        asyncio.run(main())


def test_ctrl_c_ends_the_waiting(publisher, request):
    # Where the tests run in a shell's background, Ctrl-C is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Subscriber(publisher.address) as stream:
        publisher.await_subscriptions("telemetry")
        timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            timer.start()  # here: on a machine that stands still, it is over before the next line
            next(stream)
        timer.join()
