"""The protocol's reference says what the models say."""

import json
import re
from pathlib import Path

import pytest

from prenet4d_client import schema
from prenet4d_client.messages import MESSAGE_TYPES

CLIENT = Path(__file__).parents[2] / "client"


def test_the_reference_in_the_repository_is_up_to_date(capsys):
    assert schema.main([str(CLIENT), "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["PROTOCOL.md", "protocol-v1.schema.json"])
def test_a_reference_that_differs_or_lacks_is_found(tmp_path, name, capsys):
    assert schema.main([str(tmp_path)]) == 0
    assert schema.main([str(tmp_path), "--check"]) == 0
    (tmp_path / name).write_text("old")
    assert schema.main([str(tmp_path), "--check"]) == 1
    (tmp_path / name).unlink()
    assert schema.main([str(tmp_path), "--check"]) == 1
    assert f"{name} differ" in capsys.readouterr().err


@pytest.mark.parametrize("name", MESSAGE_TYPES)
def test_every_field_and_array_is_in_the_table(name):
    reference = schema.markdown()
    section = reference.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    common = reference.split("## Fields of every header")[1].split("\n## ")[0]
    model = MESSAGE_TYPES[name]
    for field in model.model_fields.keys() | model.LAYOUT.keys():
        assert f"| `{field}`" in section + common


def test_every_type_is_said_to_go_over_a_socket():
    sockets = schema.markdown().split("four sockets", 1)[1].split("\n\n")[1]
    assert set(re.findall(r"`(\w+)`", sockets)) - {"sequence"} == set(MESSAGE_TYPES)


def test_the_schema_describes_every_message_and_field():
    definitions = schema.json_schema()["$defs"]
    for model in MESSAGE_TYPES.values():
        definition = definitions[model.__name__]
        assert definition["description"]
        assert definition["properties"].keys() == model.model_fields.keys()
        assert {"protocol", "version", "type"} <= set(definition["required"])
    assert "seconds since the epoch" in definitions["Frames"]["properties"]["time"]["description"]
    assert json.loads((CLIENT / "protocol-v1.schema.json").read_text(encoding="utf-8"))
