"""The configuration: accepted values, refused values, and the shipped file."""

import dataclasses
import re
import string
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract.errors import BadConfig
from shim.daemon.config import ROWS, Config, default_file, load

TOP = Path(__file__).parents[2]

toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_shipped_file_equals_the_generated_file() -> None:
    shipped = (TOP / "packaging" / "quickthaw.toml").read_text()
    assert shipped == default_file(), "run `python -m shim.daemon.config >packaging/quickthaw.toml`"


def test_shipped_file_sets_nothing(tmp_path: Path) -> None:
    assert load(write(tmp_path / "quickthaw.toml", default_file())) == (Config(), ())


def test_every_key_is_shown_with_its_default(tmp_path: Path) -> None:
    keys = re.sub(r"^#(?=\w+ = )", "", default_file(), flags=re.MULTILINE)
    assert set(tomllib.loads(keys)) == {row.name for row in ROWS}
    assert load(write(tmp_path / "quickthaw.toml", keys)) == (Config(), ())


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "quickthaw.toml") == (Config(), ())


def test_last_drop_in_by_name_counts(tmp_path: Path) -> None:
    main = write(tmp_path / "quickthaw.toml", 'criu = "a"\nlog_level = "debug"\n')
    write(tmp_path / "quickthaw.d" / "20.toml", 'criu = "c"\n')
    write(tmp_path / "quickthaw.d" / "10.toml", 'criu = "b"\nignore_env = ["HOSTNAME"]\n')
    write(tmp_path / "quickthaw.d" / "30.toml~", 'criu = "d"\n')
    expected = Config(criu="c", log_level="debug", ignore_env=("HOSTNAME",))
    assert load(main).config == expected


def test_unknown_key_is_a_warning_with_name_and_file(tmp_path: Path) -> None:
    main = write(tmp_path / "quickthaw.toml", 'criu_path = "x"\n[store]\nsize = 1\n')
    config, warnings = load(main)
    assert config == Config()
    assert warnings == (
        f"{main}: unknown key 'criu_path', ignored",
        f"{main}: unknown key 'store', ignored",
    )


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('criu = ""', "criu must be a program's name or absolute path, not ''"),
        ('nri_socket = "nri.sock"', "nri_socket must be an absolute path, not 'nri.sock'"),
        ("nri_plugin_index = 90", "nri_plugin_index must be two digits"),
        ("capture_timeout_s = 0", "capture_timeout_s must be a number of seconds, above 0"),
        ("capture_timeout_s = nan", "capture_timeout_s must be a number of seconds, above 0"),
        ("capture_timeout_s = true", "capture_timeout_s must be a number of seconds, above 0"),
        ("max_captures_at_once = 0", "max_captures_at_once must be a whole number from 1"),
        ('ignore_env = "HOME"', "ignore_env must be a list of names"),
        ('metrics_listen = "1.2.3.4"', 'metrics_listen must be "HOST:PORT"'),
        ('metrics_listen = ":70000"', 'metrics_listen must be "HOST:PORT"'),
        ('log_level = "loud"', "log_level must be one of debug, info, warning, error"),
        ('cross_namespace = "yes"', "cross_namespace must be true or false"),
        ("criu = ", "line 1"),
    ],
)
def test_wrong_value_names_file_key_and_reason(tmp_path: Path, line: str, why: str) -> None:
    main = write(tmp_path / "quickthaw.toml", "")
    drop_in = write(tmp_path / "quickthaw.d" / "50.toml", f"{line}\n")
    with pytest.raises(BadConfig, match=re.escape(why)) as caught:
        load(main)
    assert caught.value.about == str(drop_in)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    main = tmp_path / "quickthaw.toml"
    main.write_bytes(b'criu = "\xff"\n')
    with pytest.raises(BadConfig):
        load(main)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@given(value=toml_values)
def test_parser_accepts_or_refuses_any_value(row: dataclasses.Field[object], value: object) -> None:
    try:
        parsed = row.metadata["parse"](value)
    except ValueError:
        return
    assert type(parsed) is type(row.default)


@given(port=st.integers(1, 65535), host=st.text(string.ascii_lowercase + "-.", min_size=1))
def test_listen_address_takes_host_and_port(port: int, host: str) -> None:
    row = next(row for row in ROWS if row.name == "metrics_listen")
    for address in (f"{host}:{port}", f"[::1]:{port}", f":{port}"):
        assert row.metadata["parse"](address) == address
