"""Every command explains itself, with an example, and starts at once."""

import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from prenet4d_server.cli import app


def _commands(group, path=()):
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*path, name))


COMMANDS = list(_commands(typer.main.get_command(app)))


def test_all_commands_are_there():
    assert {path[0] for path in COMMANDS if path} == {
        *("serve", "config", "keygen", "watch", "record", "status", "freeze", "unfreeze"),
        *("recalibrate", "calibration", "simulate-detector", "replay", "train", "ship", "evaluate"),
        *("calibrate", "dashboard"),
        *("simulate", "demo", "bench", "doctor", "recording", "engines"),
    }


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "prenet4d")
def test_help_ends_with_an_example(path):
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    example = result.output.partition("Example")[2]
    assert f"prenet4d {' '.join(path)}".strip() in " ".join(example.split())
    assert "╭" not in example  # nothing comes after it


def test_help_loads_neither_torch_nor_numpy():
    script = (
        "import sys\nfrom prenet4d_server.__main__ import main\n"
        "sys.argv = ['prenet4d', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'zmq', 'h5py', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_base_installation_says_what_is_missing():
    script = (
        "import sys\nsys.modules['typer'] = None\n"
        "from prenet4d_server.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "The command needs the server extra: pip install 'prenet4d[server]'"
    )
