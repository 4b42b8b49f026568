"""The settings: one truth from file, environment and arguments; errors are sentences."""

import math
import re
from pathlib import Path

import pytest

from prenet4d_server import config_file
from prenet4d_server.config import Settings
from prenet4d_server.config_file import example_toml, load_settings
from prenet4d_server.errors import ConfigError
from prenet4d_server.sockets import generate_keys, load_keys


def write(path: Path, text: str) -> Path:
    file = path / "prenet4d.toml"
    file.write_text(text)
    return file


def test_the_example_holds_every_setting_at_its_default(tmp_path):
    example = example_toml()
    assert load_settings(write(tmp_path, example)) == load_settings()
    for name, field in Settings.model_fields.items():
        section = field.annotation
        for key in getattr(section, "model_fields", {name: None}):
            assert f"\n{key} =" in example or f"\n# {key} =" in example, (name, key)


def test_every_setting_says_what_it_is():
    for name, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        assert inner or field.description, name
        assert all(setting.description for setting in inner.values()), name


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    file = write(tmp_path, "[batch]\nsize = 9\nmax_delay_ms = 3\n[ring]\nsize = '64MiB'\n")
    monkeypatch.setenv("PRENET4D_BATCH__SIZE", "7")
    assert load_settings(file).batch.size == 7
    assert load_settings(file).batch.max_delay_ms == 3
    assert load_settings(file, batch={"size": 5}).batch.size == 5
    assert load_settings(file, batch={"size": 5}).batch.max_delay_ms == 3
    assert load_settings(file).ring.size == 64 << 20
    monkeypatch.setenv("PRENET4D_SOURCE__SCAN_SHAPE", "[3, 4]")
    assert load_settings().source.scan_shape == (3, 4)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[batch]\nsise = 3", "'batch.sise'. Did you mean 'size'"),
        ("[bach]\nsize = 3", "'bach'. Did you mean 'batch'"),
        ("[zzz]\nsize = 3", "There are: source, ring"),
        ("[batch]\nsize = 0", "batch.size"),
        ("[source]\nkind = 'merlin'", "source.kind"),
        ("[source]\nkind = 'replay'", "source.path"),
        ("[corrector]\nbackend = 'magic'", "corrector.backend"),
        ("[batch\n", "not valid TOML"),
        ("[stream]\naddress = 'tcp://*:5561'", "stream.address = 'tcp://*:5561' can be reached"),
        (
            "[http]\naddress = 'tcp://127.0.0.1:5561'",
            "stream.address and http.address are both 'tcp://127.0.0.1:5561': give each its own.",
        ),
        ("[source]\naddress = 'tcp://192.168.1.4:5560'", "source.address"),
        ("[http]\naddress = 'tcp://0.0.0.0:5564'", "HTTP is not encrypted"),
        ("[stream]\naddress = 'tcp://127.0.0.1:99999'", "stream.address: 'tcp://127.0.0.1:99999'"),
        ("[source]\naddress = 'tcp://127.0.0.1'", "'tcp://127.0.0.1' says no port"),
        ("[batch]\nsize = 'many'", "batch.size: 'many' is no whole number."),
        ("[source]\nscan_shape = '64x64'", "'64x64' is no list: write it in brackets"),
        ("[ring]\nrestart_ingest = 'maybe'", "'maybe' is neither true nor false."),
        ("[http]\noperator_token = 'short'", "it has 5 characters, and must have at least 8."),
        ("[recording]\nkeep_free = '1MiB'", "'1MiB' is too little: 64.0MiB is the least."),
        ("[source]\nscan_shape = [64]", "a value is missing"),
        ("[source]\ngain = 4", "source.gain = 4 would do nothing: FrameSender tells the gain"),
        ("[ring]\nsize = 16", "ring.size: 16 is too little: 1.0MiB is the least."),
        ("[source]\nmax_message = 9223372036854775807", "is too much: 64.0GiB is the most."),
        ("[source]\nrate = 1e-300", "source.rate: Input should be greater than or equal to 0.001."),
        ("[stream]\nhigh_water = 2147483648", "should be less than or equal to 2147483647."),
        ("[stream]\naddress = 'inproc://x'", "stream.address: 'inproc://x' is not an address"),
        ("[http]\naddress = 'ipc://x'", "write for example tcp://127.0.0.1:5564."),
        ("[ring]\nsize = '-5'", "ring.size: '-5' is no amount of memory: write for example"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(tmp_path, toml, says):
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, toml))
    assert says in str(caught.value)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_every_number_is_finite(number):
    fields = {
        (name, key): inner.annotation
        for name, field in Settings.model_fields.items()
        for key, inner in getattr(field.annotation, "model_fields", {}).items()
    }
    numbers = [place for place, kind in fields.items() if kind in (float, float | None)]
    assert len(numbers) > 15
    for section, key in numbers:
        with pytest.raises(ConfigError, match=f"{section}.{key}: Input should be a finite number"):
            load_settings(**{section: {key: number}})
    with pytest.raises(ConfigError, match=r"reference_center.0: Input should be a finite number"):
        load_settings(corrector={"reference_center": [number, 1.0]})
    with pytest.raises(ConfigError, match="drain_s: Input should be a finite number"):
        load_settings(drain_s=number)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("BATCH__SIZE", "batch.size: Input should be greater than or equal to 1."),
        ("SOURCE__GAIN", "source.gain: Input should be greater than or equal to 0.000001."),
        ("SOURCE__MAX_MESSAGE", "source.max_message: '0' is too little: 64.0KiB is the least."),
    ],
)
def test_only_memory_is_told_in_bytes(monkeypatch, name, says):
    monkeypatch.setenv(f"PRENET4D_{name}", "0")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value) == says


def test_an_unreadable_file_and_a_misspelled_variable_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "nothing.toml")
    monkeypatch.setenv("PRENET4D_SORUCE__KIND", "native")
    with pytest.raises(ConfigError, match="Did you mean 'source'"):
        load_settings()


def test_no_variable_of_ours_keeps_the_service_from_starting(monkeypatch):
    root = Path(__file__).parents[2]
    sources = [
        file
        for part in ("client", "server", "engines", "deploy")
        for file in (root / part).rglob("*")
        if file.suffix in (".py", ".ipynb", ".md", ".yaml")
    ]
    found = {
        name for file in sources for name in re.findall(r"PRENET4D_\w+", file.read_text("utf-8"))
    }
    assert found
    for name in found:
        monkeypatch.setenv(name, "")
    config_file._refuse_unknown_environment()


def test_a_variable_that_sets_no_single_value_is_refused(monkeypatch):
    monkeypatch.setenv("PRENET4D_SOURCE", "native")
    with pytest.raises(ConfigError, match="PRENET4D_SOURCE__KIND=native"):
        load_settings()


def test_a_detector_to_connect_to_may_be_anywhere():
    detector = {"kind": "dectris2", "address": "tcp://10.0.0.7:31001"}
    assert load_settings(source=detector).source.endpoint == "tcp://10.0.0.7:31001"


def test_listening_beyond_this_machine_takes_keys_or_a_word(tmp_path):
    everywhere = {"address": "tcp://*:5561"}
    assert load_settings(stream=everywhere, security={"insecure": True})
    _, secret = generate_keys(tmp_path)
    assert load_settings(stream=everywhere, security={"secret_key_file": secret})
    assert load_settings(http={"enabled": False, "address": "tcp://*:5564"})


def test_keys_are_made_once_readable_by_their_owner_and_read_back(tmp_path):
    public, secret = generate_keys(tmp_path / "keys")
    assert secret.stat().st_mode & 0o077 == 0
    pair = load_keys(secret)
    assert pair is not None
    assert pair[0].decode() in public.read_text()
    assert pair[1].decode() not in public.read_text()
    with pytest.raises(ConfigError, match="exists already"):
        generate_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="no secret key"):
        load_keys(public)
    kept = public.read_text()
    secret.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"prenet4d.key exists already"):
        generate_keys(tmp_path / "keys")
    assert public.read_text() == kept
    damaged = (tmp_path / "elsewhere").read_text().replace(pair[1].decode(), "short")
    secret.write_text(damaged)
    with pytest.raises(ConfigError, match="is damaged"):
        load_keys(secret)
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load_keys(tmp_path / "none")
