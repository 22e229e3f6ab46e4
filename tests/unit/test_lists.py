"""Lists that people read name everything that the code has, and nothing else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shim.cli import main
from shim.contract import errors
from shim.contract.errors import BadAnnotation, QuickthawError, SwapFailed

TOP: Final = Path(__file__).parents[2]
_NOT_OF_COMMANDS = (SwapFailed, BadAnnotation)
"""Their exit statuses end `quickthaw-runc`, or nothing; no command of a person ends with them."""


def tree(of: type[QuickthawError]) -> Iterator[type[QuickthawError]]:
    """Yields every error class below `of`; tests' own classes are left out."""
    for each in of.__subclasses__():
        if each.__module__ == errors.__name__:
            yield each
            yield from tree(each)


def test_error_tree_in_the_docstring_has_every_class_and_its_exit_status() -> None:
    listed = set(re.findall(r"-- (\w+) \(?(?:[\d, -]+[,-] ?)?(\d+)\)?", errors.__doc__ or ""))
    leaves = {(each.__name__, str(each.exit_code)) for each in tree(QuickthawError)}
    bases = {name for name, _ in leaves if f"{name} (" in (errors.__doc__ or "")}
    assert {row for row in listed if row[0] not in bases} == {
        row for row in leaves if row[0] not in bases
    }
    assert bases <= {name for name, _ in listed}


def test_exit_statuses_are_unique() -> None:
    codes = [each.exit_code for each in tree(QuickthawError)]
    assert len(codes) == len(set(codes))


def test_help_names_every_exit_status_of_a_command() -> None:
    text = " ".join(main.parser().format_help().split())
    listed = text.partition("exit status: ")[2].partition("examples:")[0]
    told: set[int] = set()
    for first, last in re.findall(r"\b(\d+)(?:-(\d+))?\b", listed):
        told |= set(range(int(first), int(last or first) + 1))
    needed = {
        each.exit_code for each in tree(QuickthawError) if not issubclass(each, _NOT_OF_COMMANDS)
    }
    assert needed - told == set()


def attributes_of_modules(tree: ast.Module) -> Iterator[str]:
    """Yields `module.name` wherever code takes an attribute of a plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def test_only_jsontext_parses_json() -> None:
    """json.loads raises RecursionError for deep brackets, which no `except ValueError` catches."""
    found = {
        f"{path.relative_to(TOP)}: {used}"
        for part in ("hook", "shim")
        for path in (TOP / part).rglob("*.py")
        if path != TOP / "shim/gpu/calls.py"  # runs without our packages; its asker alone writes
        for used in attributes_of_modules(ast.parse(path.read_text()))
        if used in ("json.loads", "json.load")
    }
    assert found == set()


_PARALLEL: Final = {"_Evacuation", "_Loading"}
"""Both ways of device memory have these, for the protocols of the same names in shim.gpu.way."""


def test_class_name_belongs_to_a_single_class() -> None:
    found: dict[str, list[str]] = {}
    for part in ("hook", "shim"):
        for path in sorted((TOP / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(str(path.relative_to(TOP)))
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert twice.keys() == _PARALLEL, twice
