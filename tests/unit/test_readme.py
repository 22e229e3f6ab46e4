"""The statements of the README agree with the program."""

from pathlib import Path

import pytest

from shim.nri.annotations import ANNOTATIONS, PREFIX

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()


def test_annotations_table_equals_the_annotations_of_the_parser() -> None:
    rows = [f"| `{PREFIX}{row.name}` | {row.allowed} | {row.help} |" for row in ANNOTATIONS]
    table = "\n".join(["| annotation | values | meaning |", "|---|---|---|", *rows])
    assert table in README, f"put this into README.md:\n{table}"


@pytest.mark.parametrize("target", ["demo", "test", "packages"])
def test_the_commands_exist(target: str) -> None:
    assert f"make {target}" in README
    assert f"\n{target}: " in (TOP / "Makefile").read_text()
