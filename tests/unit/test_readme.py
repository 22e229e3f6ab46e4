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


def test_both_commands_come_before_everything_else() -> None:
    heads = re.findall(r"^## (.+)$", README, re.M)
    assert heads[:2] == ["Try it", "How it works"]
    before = README[: README.index("## How it works")]
    assert re.findall(r"\bmake ([a-z]+)", before) == ["demo", "test"]


def test_table_of_targets_has_every_target_but_the_developers() -> None:
    makefile = (TOP / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):[^=\n]*## ", makefile, re.M))
    listed = {*re.findall(r"^\| `make ([a-z-]+)` \|", README, re.M), "demo", "test", "bench"}
    of_developers = {"help", "setup", "format", "lint", "protos", "test-unit", "test-node", "clean"}
    assert targets - of_developers == listed


def test_documents_are_all_listed() -> None:
    there = {path.name for path in TOP.glob("docs/*.md")} | {"CHANGELOG.md", "CONTRIBUTING.md"}
    section = README[README.index("## Documents") : README.index("## More targets")]
    assert there == set(re.findall(r"\[([\w-]+\.md)\]", section))


def test_picture_fits_a_terminal() -> None:
    (picture,) = re.findall(r"```text\n(.*?)```", README, re.S)
    assert max(map(len, picture.splitlines())) <= 100
    assert all(name in picture for name in ("containerd", "quickthawd", "quickthaw-runc", "runc"))


def test_row_of_the_tests_has_every_folder_of_tests() -> None:
    row = re.search(r"^\| `tests` \| (.*) \|$", README, re.M)
    assert row is not None
    there = {path.parent.name for path in (TOP / "tests").glob("*/*.py")}
    assert set(re.findall(r"`(\w+)`", row[1])) == there
