"""The operator's token: made, kept in a file, or set."""

import stat

import pytest

from prenet4d_server.config_file import load_settings
from prenet4d_server.errors import ConfigError
from prenet4d_server.page.operator_token import OperatorToken

URL = "http://127.0.0.1:5564"


def test_by_default_each_start_has_its_own_and_tells_it():
    first, second = OperatorToken(None, None), OperatorToken(None, None)
    assert first.secret != second.secret
    assert first.address(URL) == f"{URL}/?token={first.secret}"


def test_a_file_is_made_once_for_its_owner_alone_and_keeps_the_token(tmp_path):
    file = tmp_path / "token"
    first = OperatorToken(None, file)
    assert file.read_text().strip() == first.secret
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert OperatorToken(None, file).secret == first.secret
    assert str(file) in first.address(URL)
    assert first.secret not in first.address(URL)


def test_a_token_that_was_set_is_not_told_again():
    token = OperatorToken("open-sesame", None)
    assert token.secret == "open-sesame"
    assert "open-sesame" not in token.address(URL)


def test_a_token_that_is_guessed_is_refused():
    with pytest.raises(ConfigError, match="fewer than 8 characters"):
        OperatorToken("1234567", None)


@pytest.mark.parametrize("content", ["", "short\n", "not one word\n"])
def test_a_file_that_holds_no_token_is_refused_with_what_to_do(tmp_path, content):
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(ConfigError, match="one word of at least 8"):
        OperatorToken(None, file)


def test_a_file_that_cannot_be_had_is_named(tmp_path):
    for file in (tmp_path, tmp_path / "nowhere" / "token"):
        with pytest.raises(ConfigError, match="cannot be had"):
            OperatorToken(None, file)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not both"):
        load_settings(http={"operator_token": "x" * 8, "operator_token_file": tmp_path / "t"})
    with pytest.raises(ConfigError, match="operator_token"):
        load_settings(http={"operator_token": ""})
