"""The statements of the README agree with the program."""

import re
from pathlib import Path

import pytest

from shim.workload.annotations import ANNOTATIONS, PREFIX

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()
FOLDER = re.compile(r"`([a-z]+(?:/[a-z]+)?)`(?=[^|]*\|)").findall


def test_annotations_table_equals_the_annotations_of_the_parser() -> None:
    rows = [f"| `{PREFIX}{row.name}` | {row.allowed} | {row.help} |" for row in ANNOTATIONS]
    table = "\n".join(["| annotation | values | meaning |", "|---|---|---|", *rows])
    assert table in README, f"put this into README.md:\n{table}"


@pytest.mark.parametrize("target", ["demo", "test", "packages"])
def test_the_commands_exist(target: str) -> None:
    assert f"make {target}" in README
    assert f"\n{target}: " in (TOP / "Makefile").read_text()


def test_table_of_folders_has_every_folder_of_the_code() -> None:
    listed = {name for row in README.splitlines() if row.startswith("| `") for name in FOLDER(row)}
    there = {f"shim/{each.parent.name}" for each in (TOP / "shim").glob("*/__init__.py")}
    there |= {each.name for each in TOP.iterdir() if (each / "__init__.py").exists()} - {"shim"}
    assert there <= listed, "README's table lacks folders"
    assert {name for name in listed if name.startswith("shim/")} <= there
