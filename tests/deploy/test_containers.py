"""The container file and the compose file: what their own tools say, and what they start."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prenet4d_server.cli import app
from prenet4d_server.config_file import load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def compose() -> list[str]:
    """The command that is there, or a skipped test."""
    if shutil.which("docker"):
        plugin = ["docker", "compose"]
        if subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0:
            return plugin
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither docker compose nor docker-compose is installed here")


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_accepts_its_files(files: list[str]) -> None:
    flags = [flag for file in files for flag in ("-f", str(DEPLOY / file))]
    ran = subprocess.run(
        [*compose(), *flags, "config"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    merged = yaml.safe_load(ran.stdout)["services"]
    assert merged.keys() == {"service", "simulator", "prometheus", "grafana"}
    assert merged["service"]["build"]["target"] == ("gpu" if len(files) > 1 else "cpu")


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed here")
def test_hadolint_finds_nothing() -> None:
    ran = subprocess.run(
        ["hadolint", DEPLOY / "Containerfile"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_service_starts_with_a_configuration_that_makes_sense() -> None:
    settings = load_settings(DEPLOY / "compose.toml")
    (_, port) = settings.source.endpoint.rsplit(":", 1)
    simulator = COMPOSE["services"]["simulator"]["command"]
    assert settings.source.endpoint == f"tcp://simulator:{port}"
    assert f"--address=tcp://*:{port}" in simulator
    assert settings.source.kind == simulator[1]
    scan = "x".join(map(str, settings.source.scan_shape or ()))
    assert f"--scan={scan}" in simulator
    published = {entry.rsplit(":", 1)[1] for entry in COMPOSE["services"]["service"]["ports"]}
    listening = (settings.stream, settings.lossless, settings.control, settings.http)
    assert published == {section.address.rsplit(":", 1)[1] for section in listening}


def test_the_simulator_s_command_is_one() -> None:
    # Asking for help after all flags: they are read, and nothing is started.
    result = CliRunner().invoke(app, [*COMPOSE["services"]["simulator"]["command"], "--help"])
    assert result.exit_code == 0
    flags = {flag.split("=")[0] for flag in COMPOSE["services"]["simulator"]["command"][2:]}
    assert all(flag in result.output for flag in flags)


def test_nothing_is_reachable_from_other_machines() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")


def test_every_mounted_file_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists()
            else:
                assert source in COMPOSE["volumes"]


def test_grafana_finds_its_data_source_and_its_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/prenet4d.yaml").read_text())[
        "providers"
    ]
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = COMPOSE["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert json.loads((DEPLOY / "grafana/dashboards" / Path(home).name).read_text())["title"]


def test_the_image_needs_nothing_that_is_ignored() -> None:
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text().split()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    copied = {
        name
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    assert "USER 10001:10001" in lines
