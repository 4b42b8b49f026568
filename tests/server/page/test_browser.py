"""The page in a real browser: it loads, lives, obeys operators, and outlives restarts."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import zmq

from prenet4d_client import ControlClient, FrameSender
from prenet4d_client.errors import Prenet4dError
from prenet4d_client.wire import encode
from prenet4d_server.page.history import ROWS
from prenet4d_server.page.maps import DESCAN, SCANNED
from prenet4d_server.page.settings import PageSettings, ServiceAddress
from prenet4d_server.page.supervisor import PageProcess, listen
from prenet4d_server.page.traces import CHARTS
from prenet4d_server.processes import reserved_addresses
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, settings, until
from .telling import telemetry

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra dev is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"
)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TOKEN = "open-sesame"
PATIENCE_MS = 60_000
SIDE = 32
SCAN = (40, 50)
READ = """([name, column]) => {
    const model = window.Bokeh?.documents[0]?.get_model_by_name(name);
    if (!model) return null;
    const data = model.data instanceof Map ? Object.fromEntries(model.data) : model.data;
    return [...data[column]].map(v => (v?.length === undefined ? v : [...v]));
}"""


# What PointDrawTool does when a handle has been dragged.
DRAG = """(x) => {
    const model = window.Bokeh.documents[0].get_model_by_name("radii");
    const data = model.data instanceof Map ? Object.fromEntries(model.data) : model.data;
    model.data = {...data, x};
}"""


@pytest.fixture(scope="module")
def service_maker(tmp_path_factory):
    """Gives a function that makes the same service as often as it is called, and its addresses."""

    def prepare():
        names = ("source", "stream", "lossless", "control", "http")
        ports = dict(zip(names, held.enter_context(reserved_addresses(5)), strict=True))
        own = {
            # A browser raises its own priority; on few cores a page that gives way would never run.
            "http": {"enabled": True, "operator_token": TOKEN, "gives_way": False},
            "stream": {"preview_every_s": 0.1, "maps_every_s": 0.2},
            "corrector": {
                "backend": "torch", "threads": 1, "precision": "float32",
                "ellipse_every": 8, "patterns_to_lock": 16,
            },
            "batch": {"size": 4},
            "recording": {"directory": tmp_path_factory.mktemp("recordings")},
        }  # fmt: skip
        for name, address in ports.items():
            own.setdefault(name, {})["address"] = address
        return lambda: Service(settings(**own, drain_s=0.5)), ports

    with ExitStack() as held:
        yield prepare


@pytest.fixture(scope="module")
def service(service_maker):
    make_service, _ = service_maker()
    with make_service() as running:
        yield running


@pytest.fixture(scope="module")
def control(service):
    with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client:
        yield client


@contextmanager
def scanning(address):
    """Frames of a wandering disk keep coming, scan after scan."""
    stop = threading.Event()
    y, x = np.mgrid[:SIDE, :SIDE]
    rng = np.random.default_rng(1)

    def send():
        # A service that is stopped takes no more frames: that is its own test's business.
        with suppress(Prenet4dError), FrameSender(address, timeout=60) as source:
            while not stop.is_set():
                source.start(frame_shape=(SIDE, SIDE), dtype="uint16", scan_shape=SCAN)
                for number in range(0, SCAN[0] * SCAN[1], 8):
                    if stop.wait(0.15):
                        break
                    center = 15.5 + 2 * np.sin(number / 40)
                    disk = 8.0 * (np.hypot(y - center, (x - 15.5) * 1.02) < 5) + 0.05
                    source.send(rng.poisson(np.broadcast_to(disk, (8, SIDE, SIDE))).astype("u2"))
                source.end()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def scan(service):
    with scanning(service.endpoints["ingest"]):
        yield


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Page:
    """One browser's window, with all that went wrong in it."""

    def __init__(self, browser, url, token=None):
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000})
        self.context.set_default_timeout(PATIENCE_MS)
        self.tab = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", self._note)
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.url = url
        self.tab.goto(f"{url}/?token={token}" if token else url, wait_until="commit")
        self.wait_until_live()

    def wait_until_live(self):
        self.tab.wait_for_function("() => window.Bokeh?.documents[0]?.get_model_by_name('pulse')")
        self.text("pulse", "updates/s")

    def text(self, slot, *parts):
        """Wait until this place on the page says all of these."""
        place = self.tab.locator(f".slot.{slot} .bk-clearfix")
        for part in parts:
            sync_api.expect(place).to_contain_text(part, timeout=PATIENCE_MS)

    def read(self, source, column):
        return self.tab.evaluate(READ, [source, column])

    def until(self, condition):
        """Wait while the browser goes on."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            self.tab.wait_for_timeout(50)

    def press(self, slot):
        self.tab.locator(f".slot.{slot} button").click()

    def _note(self, message):
        if message.type == "error":
            self.wrong.append(message.text)


@contextmanager
def opened(browser, url, token=None):
    page = Page(browser, url, token)
    try:
        yield page
    finally:
        page.context.close()


@pytest.fixture(scope="module")
def operator(chromium, service, scan):
    with opened(chromium, service.endpoints["http"], TOKEN) as page:
        yield page


def test_every_panel_lives_during_a_scan_and_nothing_comes_from_elsewhere(operator):
    page = operator
    assert page.tab.url == page.url + "/"  # the token has left the address
    page.text("state", "patterns")
    page.text("beam", "moved")
    page.text("ellipticity", "long axis")
    page.text("rate", "p50 / p99")
    page.text("progress", "of 2,000")
    page.text("counters", "received", "✓")
    page.text("calibration", "Reference center")
    page.text("events", "began")
    page.text("title", "40 × 50 positions")

    def seen():
        traces = {chart.curves[0].column: page.read("traces", chart.curves[0].column)[-1:]
                  for chart in CHARTS}  # fmt: skip
        maps = {kind.name: page.read(f"{kind.name}_map", "image") for kind in SCANNED}
        images = {side: page.read(f"{side}_image", "image") for side in ("raw", "corrected")}
        return {**traces, **maps, **images, "time": page.read("traces", "time")}

    page.until(lambda: len(page.read("traces", "time")) > 1)
    page.until(lambda: len(page.read("sum_map", "image")[0]) > 1)
    told = page.tab.locator(".slot.told .bk-clearfix").inner_text()
    before = seen()
    changed: set[str] = set()

    def all_changed():
        now = seen()
        changed.update(name for name in now if str(now[name]) != str(before[name]))
        # A quiet scan has no flags, no backlog, and counts of one kind only now and then.
        return set(now) - changed <= {"flags", "backlog", "dose"}

    page.until(all_changed)
    page.until(lambda: page.tab.locator(".slot.told .bk-clearfix").inner_text() != told)

    page.text("descan", "First to last row")  # once a quarter of the scan was seen
    page.until(lambda: all(len(page.read(f"{kind.name}_map", "image")[0]) > 1 for kind in DESCAN))
    assert page.wrong == []
    assert {url.split("/")[2] for url in page.asked if "://" in url} == {page.url.split("/")[2]}


CUT = """(places) => places.filter(
    (place) => place.scrollWidth > place.clientWidth + 1).map((place) => place.textContent)"""
CUT_HINT = """(input) => {
    const pen = document.createElement("canvas").getContext("2d");
    const style = getComputedStyle(input);
    pen.font = style.font;
    const room = input.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return pen.measureText(input.placeholder).width > room;
}"""


@pytest.mark.parametrize("width", [820, 1280, 1920])
def test_no_words_are_cut_whatever_the_width(operator, width):
    page = operator
    page.until(lambda: len(page.read("sum_map", "image")[0]) > 1)
    before = page.tab.viewport_size
    page.tab.set_viewport_size({"width": width, "height": 900})
    try:
        for place in (".caption", ".caption *", "figcaption", ".figure .below", ".figure .label"):
            assert page.tab.locator(place).evaluate_all(CUT) == [], place
        assert not page.tab.locator(".slot.center input").evaluate(CUT_HINT)
    finally:
        page.tab.set_viewport_size(before)


def test_the_page_says_that_it_loads_before_its_scripts_are_there(chromium, service):
    context = chromium.new_context()
    context.set_default_timeout(PATIENCE_MS)
    try:
        tab = context.new_page()
        held, may_pass = [], []
        tab.route(
            "**/static/js/**",
            lambda request: request.continue_() if may_pass else held.append(request),
        )
        tab.goto(service.endpoints["http"], wait_until="commit")
        loading = tab.get_by_text("Loading the page")
        sync_api.expect(loading).to_be_visible(timeout=PATIENCE_MS)
        sync_api.expect(tab.get_by_text("Scan maps")).to_be_visible(timeout=PATIENCE_MS)
        while not held:
            tab.wait_for_timeout(50)
        sync_api.expect(loading).to_be_visible(timeout=PATIENCE_MS)
        may_pass.append(True)
        for request in held:
            request.continue_()
        sync_api.expect(loading).to_be_hidden(timeout=PATIENCE_MS)
    finally:
        context.close()


@contextmanager
def own_page():
    """A page's process, not started yet, that belongs to no service; and where it will be."""
    listening, url = listen("tcp://127.0.0.1:*")
    page = PageProcess(listening, lambda _status: None)
    try:
        yield page, url
    finally:
        page.close()


def test_who_opens_the_page_after_a_scan_sees_how_it_ended(chromium, service_maker):
    make_service, ports = service_maker()
    address = ServiceAddress(stream=ports["stream"], control=ports["control"])
    with own_page() as (dashboard, url), make_service() as again:
        with FrameSender(again.endpoints["ingest"], timeout=60) as source:
            source.start(frame_shape=(SIDE, SIDE), dtype="uint16", scan_shape=(4, 4))
            y, x = np.mgrid[:SIDE, :SIDE]
            disk = 100 * (np.hypot(y - 15.5, x - 15.5) < 5)
            source.send(np.broadcast_to(disk, (16, SIDE, SIDE)).astype("u2"))
            source.end()
        until(lambda: again.status().counters.corrected == 16)
        until(lambda: again.status().acquisition is None)
        dashboard.start(PageSettings(service=address, operator_token=TOKEN))
        with opened(chromium, url) as page:
            page.text("banner", "The last scan has ended; 16 frames came")
            page.text("told", "frame ")
            page.until(lambda: len(page.read("corrected_image", "image")[0]) > 1)
            assert page.wrong == []


def downloaded(page, link):
    with page.tab.expect_download() as saved:
        page.tab.get_by_role("link", name=link).click()
    return Path(saved.value.path()).read_text()


def test_buttons_do_what_they_say(operator, control, tmp_path):
    page = operator
    page.press("freeze")
    page.text("said", "Freezing: done")
    page.until(lambda: control.status()["state"] == "frozen")  # from the next batch on
    page.text("state", "Frozen")
    sync_api.expect(page.tab.locator(".slot.freeze button")).to_have_text(
        "Unfreeze", timeout=PATIENCE_MS
    )
    page.press("freeze")
    page.text("said", "Unfreezing: done")
    page.until(lambda: control.status()["state"] != "frozen")

    page.press("recalibrate")
    page.text("said", "Recalibrating: done")
    page.text("events", "found anew")

    center = page.tab.locator(".slot.center input")
    center.fill("14, 16.5")
    center.press("Tab")
    page.press("set_center")
    page.text("said", "Reference center 14.00, 16.50 px: done")
    page.until(lambda: control.status()["reference_center"] == [14, 16.5])
    center.fill("somewhere")
    center.press("Tab")
    page.press("set_center")
    page.text("said", "no center")
    page.press("clear_center")
    page.text("said", "configuration: done")
    page.until(lambda: control.status()["reference_center"] == [15.5, 15.5])

    page.until(lambda: page.read("radii", "x"))
    handles = page.read("radii", "x")
    page.tab.evaluate(DRAG, [handles[0], handles[1] - 1, handles[2]])
    page.text("said", "px: done")
    page.until(lambda: not control.status()["maps"]["detectors"]["automatic"])
    page.press("auto_radii")
    page.text("said", "from the pattern: done")

    page.press("record")
    page.text("said", "Starting a recording: done")
    page.until(lambda: control.status()["recording"]["state"] == "recording")
    sync_api.expect(page.tab.locator(".slot.record button")).to_have_text(
        "Stop recording", timeout=PATIENCE_MS
    )
    page.press("record")
    page.text("said", "Stopping the recording: done")
    page.until(lambda: control.status()["recording"]["state"] == "idle")

    calibration = control.save_calibration() | {"ratio": 1.0625, "theta": 0.25}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(calibration))
    page.tab.locator(".slot.file input[type=file]").set_input_files(file)
    page.text("said", "Calibration mine.json: done")
    page.text("events", "A calibration was loaded")
    (tmp_path / "bad.toml").write_text("ratio = ")
    page.tab.locator(".slot.file input[type=file]").set_input_files(tmp_path / "bad.toml")
    page.text("said", "bad.toml is not valid TOML")

    # A scan that has just begun has no descan yet.
    page.until(lambda: "[descan]" in downloaded(page, "Save calibration"))
    (tmp_path / "saved.toml").write_text(downloaded(page, "Save calibration"))
    page.tab.locator(".slot.file input[type=file]").set_input_files(tmp_path / "saved.toml")
    page.text("said", "Calibration saved.toml: done")
    with page.tab.expect_download(timeout=PATIENCE_MS) as picture:
        page.tab.get_by_text("snapshot PNG").click()
    assert Path(picture.value.path()).read_bytes().startswith(b"\x89PNG")
    assert page.wrong == []


def shown(page):
    """How patterns are shown, as the server has it: kind of scale, and colors."""
    return page.tab.evaluate("""() => {
        const [raw] = window.Bokeh.documents[0].get_model_by_name("raw").renderers;
        const {type, palette} = raw.glyph.color_mapper;
        return [type, palette[palette.length - 1]];
    }""")


@pytest.fixture(scope="module")
def viewer(chromium, service, scan):
    with opened(chromium, service.endpoints["http"]) as page:
        yield page


def test_how_patterns_are_shown_stays_as_it_was_chosen(viewer):
    page = viewer
    before = shown(page)
    page.tab.locator(".slot.scale").get_by_text("linear").click()
    page.tab.locator(".slot.palette select").select_option("Gray")
    page.until(lambda: shown(page)[0] != before[0] and shown(page)[1] != before[1])
    chosen = shown(page)
    page.tab.reload(wait_until="commit")
    page.wait_until_live()
    page.until(lambda: shown(page) == chosen)
    sync_api.expect(page.tab.locator(".slot.palette select")).to_have_value(
        "Gray", timeout=PATIENCE_MS
    )

    page.tab.evaluate("""() => localStorage.setItem("prenet4d-display",
        '{"scale": 7, "palette": "Plaid", "contrast": [90, 10]}')""")
    page.tab.reload(wait_until="commit")
    page.wait_until_live()
    page.until(lambda: shown(page) == before)
    assert page.wrong == []


# A viewer's browser can be made to send what an operator's would, button at rest or not.
FORGE = """(name) => {
    const page = window.Bokeh.documents[0];
    page.views_manager.find_one(page.get_model_by_name(name)).click();
}"""


def test_a_viewer_looks_and_commands_nothing(viewer, control):
    page = viewer
    page.text("said", "You are looking only")
    page.text("title", "40 × 50 positions")
    buttons = ("recalibrate", "freeze", "set_center", "clear_center", "auto_radii", "record")
    for name in buttons:
        sync_api.expect(page.tab.locator(f".slot.{name} button")).to_be_disabled()
    sync_api.expect(page.tab.locator(".slot.file input")).to_be_disabled()
    for name in buttons:
        page.tab.evaluate(FORGE, name)
    # What was sent before this has been dealt with once this is.
    high = page.tab.evaluate(LINEAR)
    page.until(lambda: page.tab.evaluate(HIGH) != high)
    page.text("said", "You are looking only")
    status = control.status()
    assert status["state"] != "frozen"
    assert status["recording"]["state"] == "idle"

    page.tab.get_by_placeholder("operator's token").fill(TOKEN)
    page.tab.get_by_role("button", name="Command").click()
    page.tab.get_by_text("operator", exact=True).wait_for()
    assert page.tab.url == page.url + "/"
    assert page.wrong == []


HIGH = """() => window.Bokeh.documents[0].get_model_by_name("raw").renderers[0]
    .glyph.color_mapper.low"""
LINEAR = """() => {
    const low = window.Bokeh.documents[0].get_model_by_name("raw").renderers[0]
        .glyph.color_mapper.low;
    window.Bokeh.documents[0].get_model_by_name("scale").active = 1;
    return low;
}"""


def test_the_page_outlives_the_service_and_its_own_server(chromium, service_maker):
    """It runs elsewhere than the service, as ``prenet4d dashboard`` does."""
    make_service, ports = service_maker()
    address = ServiceAddress(stream=ports["stream"], control=ports["control"])
    with own_page() as (dashboard, url):
        dashboard.start(PageSettings(service=address, operator_token=TOKEN))
        with opened(chromium, url, TOKEN) as page:
            page.text("banner", "Connecting to the service")
            with make_service() as again, scanning(again.endpoints["ingest"]):
                page.text("progress", "of 2,000")
            page.text("banner", "does not answer since")
            assert page.wrong == []
            with make_service() as again, scanning(again.endpoints["ingest"]):
                before = page.read("traces", "time")
                page.until(lambda: len(page.read("traces", "time")) > len(before) + 1)
                sync_api.expect(page.tab.locator(".banner.bad")).to_have_count(
                    0, timeout=PATIENCE_MS
                )

                loaded = page.tab.evaluate("() => performance.timeOrigin")
                os.kill(dashboard.pid, signal.SIGKILL)
                page.tab.wait_for_function("(then) => performance.timeOrigin > then", arg=loaded)
                page.wait_until_live()
                page.text("progress", "of 2,000")
                page.tab.get_by_text("operator", exact=True).wait_for()


def heap(page):
    """Bytes that the page's scripts hold, garbage not counted."""
    session = page.context.new_cdp_session(page.tab)
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return used


def test_an_hour_s_curves_do_not_grow_the_browser_s_memory(chromium):
    """A service says within seconds what takes hours, a row of the curves with every message."""
    message = telemetry()
    listening, url = listen("tcp://127.0.0.1:*")
    page_process = PageProcess(listening, lambda _status: None)
    with zmq.Context() as context, context.socket(zmq.PUB) as stream:
        stream.linger = 0
        stream.sndhwm = 0
        port = stream.bind_to_random_port("tcp://127.0.0.1")
        second = itertools.count(1000)

        def say(rows):
            for at in itertools.islice(second, rows):
                header = message.header.model_copy(update={"time": float(at), "sequence": at})
                stream.send_multipart(encode(header, message.arrays))

        try:
            address = ServiceAddress(stream=f"tcp://127.0.0.1:{port}", control="tcp://127.0.0.1:9")
            page_process.start(PageSettings(service=address, updates_per_second=4))
            with opened(chromium, url) as page:
                page.until(lambda: say(2) or len(page.read("traces", "time")) > 10)
                page.until(lambda: say(900) or len(page.read("traces", "time")) >= ROWS)
                before, first = heap(page), page.read("traces", "time")[0]
                page.until(lambda: say(900) or page.read("traces", "time")[0] > first + ROWS * 1e3)
                assert len(page.read("traces", "time")) == ROWS
                assert heap(page) < 1.25 * before
                assert page.wrong == []
        finally:
            page_process.close()
