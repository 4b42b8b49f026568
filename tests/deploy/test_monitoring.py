"""Prometheus and Grafana load what is in ``deploy/``, and every metric that it names exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from prenet4d_client import ControlClient, FrameSender
from prenet4d_server.monitoring.metrics import exposition
from prenet4d_server.monitoring.status import GpuStatus, RecordingStatus, Status
from prenet4d_server.processes import RunningService, reserved_addresses

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "prenet4d.json").read_text())
# Series of a histogram or of a counter that come from the metric of the name before them.
METRIC = re.compile(r"\bprenet4d_\w+")
SELECTOR = re.compile(r"\b(prenet4d_\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|!=|!~|=)"([^"]*)"')
TIMEOUT_S = 60.0

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not installed here"
)


def expressions() -> list[str]:
    """Every query of the dashboard, as Grafana would send it."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [
        expr.replace("$__rate_interval", "1m").replace("$instance", ".*").strip() for expr in found
    ]


def run(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """In the middle of a scan, with a frame that was refused."""
    settings: dict[str, Any] = {
        "corrector": {"backend": "identity"},
        "ring": {"size": "8MiB"},
        "http": {"gives_way": False},
    }
    with (
        RunningService(tmp_path_factory.mktemp("service"), **settings) as running,
        FrameSender(running.detector, timeout=TIMEOUT_S) as source,
    ):
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(4, 5))
        source.send(np.ones((10, 16, 24), np.uint16))
        source.send(np.ones((1, 16, 24), np.uint16), [99])
        deadline = time.monotonic() + TIMEOUT_S
        while sum(status_of(running).latency_histograms["total"].counts) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield running


def status_of(service: RunningService) -> Status:
    with ControlClient(service.control, timeout=TIMEOUT_S) as client:
        return Status.model_validate(client.status())


@pytest.fixture(scope="module")
def series(service: RunningService) -> dict[str, dict[str, set[str]]]:
    """Everything that a service can tell: metric → label → its values."""
    now = status_of(service)
    assert now.ellipticity is not None
    everything = now.model_copy(
        update={
            "gpu": GpuStatus(name="GPU", memory_used_bytes=1, memory_bytes=2, load=0.5),
            "recording": RecordingStatus(
                state="recording", directory="/data", free_bytes=1, name="a", files=(), patterns=1,
                absent=0, started=0.0, complete=True, reason="",
            ),
            "receivers_behind_s": {"recorder": 0.0},
            "ellipticity": now.ellipticity.model_copy(update={"ratio_sigma": 0.001}),
        }
    )  # fmt: skip
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(exposition(everything).decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {"instance": set()})  # Prometheus adds it
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def test_every_metric_that_is_used_exists(series: dict[str, dict[str, set[str]]]) -> None:
    used = set(METRIC.findall(" ".join(expressions())))
    used |= set(METRIC.findall(RULES.read_text()))
    assert len(used) > 20
    assert used <= series.keys()


def test_every_label_that_is_used_exists(series: dict[str, dict[str, set[str]]]) -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    queries = [(rule["expr"], rule["annotations"]["summary"]) for rule in group["rules"]]
    for panel in DASHBOARD["panels"]:
        queries += [(each["expr"], each["legendFormat"]) for each in panel["targets"]]
    for expr, said in queries:
        for metric, matchers in SELECTOR.findall(expr):
            for label, operator, value in MATCHER.findall(matchers):
                assert label in series[metric], expr
                assert operator != "=" or value in series[metric][label], expr
        there = {"instance"}.union(*(series[metric] for metric in METRIC.findall(expr)))
        told = set(re.findall(r"{{\s*(?:\$labels\.)?(\w+)\s*}}", said))
        for kept in re.findall(r"\bby \(([^)]*)\)", expr):
            by = set(kept.split(", "))
            assert by <= there, expr
            there = by  # others are summed over
        assert told <= there, said


def test_the_dashboard_names_no_data_source_of_somebody_s_own() -> None:
    assert DASHBOARD["uid"] == "prenet4d"
    assert "id" not in DASHBOARD
    sources = {json.dumps(panel["datasource"]) for panel in DASHBOARD["panels"]}
    assert sources == {'{"type": "prometheus", "uid": "${datasource}"}'}
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_no_two_panels_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    assert "1 rule files found" in run(
        "promtool", "check", "config", RULES.parent / "prometheus.yml"
    )
    assert "15 rules found" in run("promtool", "check", "rules", RULES)


@needs_promtool
def test_the_rules_alert_when_they_should_and_only_then() -> None:
    tests = RULES.parent / "rules_test.yml"
    assert "SUCCESS" in run("promtool", "test", "rules", tests)
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    assert alerts == set(re.findall(r"alertname: (\w+)", tests.read_text()))


@pytest.fixture
def own_address() -> Iterator[str]:
    with reserved_addresses(1) as (address,):
        yield address


@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed here")
def test_prometheus_itself_answers_every_query(
    service: RunningService, own_address: str, tmp_path: Path
) -> None:
    config = (RULES.parent / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(
        config.replace("service:5564", urllib.parse.urlsplit(service.http).netloc).replace(
            ": 5s", ": 1s"
        )
    )
    shutil.copy(RULES, tmp_path)
    address = urllib.parse.urlsplit(own_address).netloc

    # This service has no GPU, no recording, no receivers and no reading of the ellipticity.
    absent = ("gpu", "recording", "receiver_behind", "ratio_sigma")
    wanted = [expr for expr in expressions() if not any(name in expr for name in absent)]

    def ask(path: str, **parameters: str) -> Any:
        url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return json.load(answer)["data"]

    with (tmp_path / "log").open("wb") as log:
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={tmp_path}/prometheus.yml",
             f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address={address}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline, without = time.monotonic() + TIMEOUT_S, wanted
        while True:
            assert time.monotonic() < deadline, (without, (tmp_path / "log").read_text())
            time.sleep(0.2)
            try:
                groups = ask("rules")["groups"]
                healthy = all(rule["health"] == "ok" for group in groups for rule in group["rules"])
                # Rates have no value before the second scrape, and nothing has one after a scrape
                # that came too late.
                without = [expr for expr in wanted if not ask("query", query=expr)["result"]]
                if healthy and not without:
                    break
            except OSError:
                assert prometheus.poll() is None, (tmp_path / "log").read_text()
    finally:
        prometheus.terminate()
        prometheus.wait()
