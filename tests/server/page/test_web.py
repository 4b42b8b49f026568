"""HTTP: health and metrics, who may command, and a page's process that dies and comes back."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from http.cookiejar import CookieJar

import psutil
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from prenet4d_client.errors import CommandRefused
from prenet4d_server.errors import BindError
from prenet4d_server.page.feed import Feed
from prenet4d_server.page.settings import PageSettings, ServiceAddress
from prenet4d_server.page.supervisor import PageProcess, listen
from prenet4d_server.service import Service
from prenet4d_server.sockets import generate_keys

from ..live import FREE, TIMEOUT_S, frames, listening, sender, settings, until

TOKEN = "sesame-öffne-dich"
PATIENCE_S = 60.0  # a page's process starts late on a busy machine


@pytest.fixture(scope="module")
def service():
    http = {"enabled": True, "operator_token": TOKEN}
    with Service(settings(http=http)) as running, listening(running) as listener:
        with sender(running) as source:
            named = {"acquisition_id": r"what looks like $\frac$ a formula"}
            source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3), **named)
            source.send(frames(6))
            source.send(frames(1), [99])
            source.end()
        listener.wait_for("acquisition_end")
        running.listener = listener
        yield running


@pytest.fixture
def browser():
    """Keeps cookies and follows redirects."""
    jar = CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    opener.jar = jar
    return opener


def get(url, browser=None):
    """Status, body and where it came from in the end."""
    try:
        with (browser or urllib.request.build_opener()).open(url, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read(), answer.url
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.url


def answered(url):
    """The same, once the service has answered the page, which takes no answer that is late."""
    while (said := get(url))[0] == 503:
        time.sleep(0.1)
    return said


def test_health_and_metrics_come_from_the_service(service):
    url = service.endpoints["http"]
    assert answered(url + "/healthz")[:2] == (200, b"yes\n")
    assert answered(url + "/readyz")[:2] == (200, b"yes\n")
    assert get(url + "/nothing")[0] == 404
    text = answered(url + "/metrics")[1].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {
        sample.labels["outcome"]: sample.value for sample in families["prenet4d_frames"].samples
    }
    assert values == {"received": 7, "corrected": 6, "rejected": 1, "shed": 0}


def test_a_service_that_is_gone_is_unhealthy_with_a_reason():
    gone = "tcp://127.0.0.1:9"  # nobody listens at the port of discard
    listening_socket, url = listen(FREE)
    process = PageProcess(listening_socket, lambda _status: None)
    try:
        process.start(PageSettings(service=ServiceAddress(stream=gone, control=gone)))
        for path in ("/healthz", "/metrics"):
            code, body, _ = get(url + path)
            assert code == 503
            assert b"No service answered" in body
        assert get(url + "/")[0] == 200
    finally:
        process.close()


def test_a_token_with_a_slip_of_the_pen_is_not_kept_in_the_log(capfd):
    nobody = ServiceAddress(stream="tcp://127.0.0.1:9", control="tcp://127.0.0.1:9")
    listening_socket, url = listen(FREE)
    process = PageProcess(listening_socket, lambda _status: None)
    try:
        process.start(PageSettings(service=nobody, operator_token="operators-secret"))
        assert get(url + "/?token=operators-secre")[0] == 403
    finally:
        process.close()
    log = capfd.readouterr().err
    assert "403 GET / (127.0.0.1)" in log
    assert "secre" not in log


def test_a_calibration_that_is_asked_for_too_early_is_no_failure():
    with Service(settings(http={"enabled": True})) as service:
        code, said, _ = answered(service.endpoints["http"] + "/calibration.toml")
    assert (code, said[:30]) == (409, b"No acquisition has begun yet: ")


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux alone has an idle class")
@pytest.mark.parametrize("gives_way", [True, False])
def test_the_page_runs_behind_every_other_program_unless_it_must_not(gives_way):
    with Service(settings(http={"enabled": True, "gives_way": gives_way})) as service:
        assert answered(service.endpoints["http"] + "/healthz")[0] == 200
        assert (os.sched_getscheduler(service._page.pid) == os.SCHED_IDLE) is gives_way


def test_the_page_and_all_it_needs_come_from_here(service):
    url = service.endpoints["http"]
    code, page, _ = get(url)
    assert code == 200
    links = [part.split(b'"')[0] for part in page.split(b'src="')[1:] + page.split(b'href="')[1:]]
    assert any(b"static/js/bokeh" in link for link in links)
    assert not [link for link in links if b"//" in link]
    for name in (b"page.css", b"panel.css", b"page.js", b"icon.svg"):
        assert get(f"{url}/assets/{name.decode()}")[0] == 200
    scripts = (f"/autoload{dot}js?bokeh-autoload-element=1" for dot in (".", "X"))
    for path in (*scripts, "/metadata"):
        assert get(url + path)[0] == 404


def test_the_token_makes_an_operator_and_leaves_the_address(service, browser):
    url = service.endpoints["http"]
    assert b">viewer<" in get(url, browser)[1]

    code, page, where = get(f"{url}/?token={urllib.parse.quote(TOKEN)}", browser)

    assert (code, where) == (200, url + "/")
    assert b">operator<" in page
    cookie = next(cookie for cookie in browser.jar if cookie.name.startswith("prenet4d-operator"))
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Strict"
    assert b">operator<" in get(url, browser)[1]
    assert TOKEN.encode() not in page
    assert b">viewer<" in get(url)[1]


def test_a_wrong_token_is_refused_in_words(service, browser):
    code, page, _ = get(service.endpoints["http"] + "/?token=wrong", browser)
    assert code == 403
    assert b"This token is not valid" in page
    assert not list(browser.jar)


def test_the_look_can_be_changed(service, browser):
    url = service.endpoints["http"]
    assert b'data-theme="dark"' in get(url, browser)[1]
    assert b'data-theme="light"' in get(url + "/?theme=light", browser)[1]
    assert b'data-theme="light"' in get(url, browser)[1]
    assert b'data-theme="dark"' in get(url + "/?theme=%3Cscript%3E", browser=None)[1]


@pytest.mark.parametrize("page", ["own", "https://elsewhere.example", "http://localhost:1"])
def test_only_pages_from_here_may_open_the_websocket(service, page):
    url = service.endpoints["http"]
    body = get(url)[1].decode()
    token = body.split('"token":"')[1].split('"')[0]
    request = HTTPRequest(
        url.replace("http:", "ws:") + "/ws",
        headers={
            "Origin": url if page == "own" else page,
            "Sec-WebSocket-Protocol": f"bokeh, {token}",
        },
        request_timeout=PATIENCE_S,
    )

    async def connect():
        connection = await websocket_connect(request)
        hello = await connection.read_message()
        connection.close()
        return hello

    loop = IOLoop(make_current=False)
    try:
        if page == "own":
            assert json.loads(loop.run_sync(connect))["msgtype"] == "ACK"
        else:
            with pytest.raises(HTTPClientError, match="403"):
                loop.run_sync(connect)
    finally:
        loop.close(all_fds=True)


def test_a_calibration_and_a_picture_can_be_had(service):
    url = service.endpoints["http"]
    code, text, _ = answered(url + "/calibration.toml")
    assert code == 200
    assert tomllib.loads(text.decode())["ratio"] == 1
    code, picture, _ = answered(url + "/snapshot.png")
    assert code == 200
    assert picture.startswith(b"\x89PNG")


def test_a_dead_page_is_told_of_and_started_again(service):
    url, before = service.endpoints["http"], service._page.pid
    os.kill(before, signal.SIGKILL)
    said = service.listener.wait_for_event("page_died")
    assert "started again" in said.message
    assert answered(url + "/healthz")[:2] == (200, b"yes\n")  # who asked meanwhile has waited
    assert service._page.pid != before
    assert service.status().healthy


BOKEH_LOGS = """
import logging
from prenet4d_server import logs
from prenet4d_server.config import LogSettings
from prenet4d_server.page.process import tame_bokehs_log
logs.configure(LogSettings(format="json"), "page")
tame_bokehs_log()
logging.getLogger("bokeh.server.views.ws").warning("Failed sending message")
handler = logging.getLogger("bokeh.server.protocol_handler")
for error in (AssertionError(), ValueError("bad")):
    try:
        raise error
    except Exception:
        handler.error("error handling message", exc_info=True)
"""


def test_bokeh_s_log_is_written_as_ours_without_browsers_that_went_away():
    command = [sys.executable, "-c", BOKEH_LOGS]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = ran.stderr.splitlines()
    said = json.loads(line)
    assert (said["process"], said["message"]) == ("page", "error handling message")
    assert "bad" in said["traceback"]


def test_the_page_ends_with_the_service():
    http = {"enabled": True}
    with Service(settings(http=http)) as running:
        page = psutil.Process(running._page.pid)
    assert not page.is_running()


@pytest.mark.skipif(not zmq.has("curve"), reason="this pyzmq was built without CURVE")
def test_the_page_of_an_encrypted_service_is_one_of_its_operators(tmp_path):
    somebody = zmq.curve_keypair()[0].decode()
    key_file = generate_keys(tmp_path)[1]
    security = {"secret_key_file": key_file, "operator_keys": [somebody]}
    with Service(settings(http={"enabled": True}, security=security)) as running:
        assert answered(running.endpoints["http"] + "/healthz")[:2] == (200, b"yes\n")
        page = PageSettings.model_validate_json(running._page._settings)
        with (
            Feed(page.service).client(TIMEOUT_S) as commanding,
            pytest.raises(CommandRefused, match="No acquisition has begun"),
        ):
            commanding.freeze()


def test_a_port_in_use_is_named_and_nothing_is_left_running(service):
    taken = service.endpoints["http"].replace("http:", "tcp:")
    children = psutil.Process().children()
    http = {"enabled": True, "address": taken}
    with pytest.raises(BindError, match=taken), Service(settings(http=http)):
        pass
    assert psutil.Process().children() == children
    until(lambda: service.status().healthy, TIMEOUT_S)
