"""`shim.contract.paths` is the only place that spells quickthaw's paths and file names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.contract import paths
from shim.contract.parts import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[3]
ROOTS = (paths.RUN, paths.STORE, paths.ETC, paths.PREFIX)
CONSTANTS = {name: value for name, value in vars(paths).items() if name.isupper()}
NAMES = {value.rpartition("/")[2] for value in CONSTANTS.values()} - {"quickthaw"}
"""Of files and directories, and endings. Of these, a word without a dot counts only in a path."""
SUFFIXES = tuple(name for name in NAMES if name.startswith("."))
LATER = NAMES - {part.name for part in PARTS}
"""Names that count anywhere in a path: `/dev/shm` is no part of a snapshot."""
NOT_PATHS = {paths.GPU_PAYLOAD}
SHELL = ("hook/quickthaw-hook", "hook/quickthaw-opened", "shim/front/quickthaw-runc")


def modules() -> Iterator[Path]:
    for folder in ("shim", "hook"):
        yield from sorted((TOP / folder).rglob("*.py"))


def spelled(text: str) -> bool:
    """Whether a literal is a path of quickthaw, a listed file name, or ends in a listed ending."""
    if any(root in text for root in ROOTS):
        return True
    is_ending = text.endswith(SUFFIXES) and not text.startswith("..")
    return is_ending or ("." in text and text in NAMES - NOT_PATHS)


def in_path(text: str) -> bool:
    """Whether text that follows a directory names a listed file, as `/journal` does."""
    first, *later = re.findall(r"(?:^|/)([\w.-]+)", text) or [""]
    return first in NAMES or any(name in LATER for name in later)


def literals(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yields line and text of each string that is no docstring, and whether a directory precedes.

    A directory precedes in `f"{directory}/name"`, `directory + "/name"` and `directory / "name"`.
    """
    silent: set[int] = set()
    following: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(id(node.value))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.Add):
            following.add(id(node.right))
        if isinstance(node, ast.JoinedStr):
            for before, each in zip(node.values, node.values[1:], strict=False):
                if isinstance(before, ast.FormattedValue):
                    following.add(id(each))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in silent:
            continue
        if isinstance(node.value, str | bytes):
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            yield node.lineno, text, id(node) in following


def found_in(source: str) -> list[int]:
    return [
        line
        for line, text, follows in literals(ast.parse(source))
        if spelled(text) or (follows and in_path(text))
    ]


@pytest.mark.parametrize(
    "source",
    [
        'X = "/run/quickthaw/tickets"',
        'X = b"/var/lib/quickthaw"',
        'X = "see /etc/quickthaw/keys/node.pub"',
        'X = f"/etc/quickthaw/{name}"',
        'X = "criu.conf"',
        'X = f"{private}/journal"',
        f'X = f"{{private}}/{paths.CONTAINER_WORK}/dump.log"',
        'X = private + "/journal"',
        'X = root / "staging"',
        'X = snapshot / "shm"',
        'X = f"space-{number}.data"',
        'X = "rootfs.tree"',
        'X = f"give {keys.path}/node.pub to the other nodes"',
    ],
)
def test_this_test_sees_a_path(source: str) -> None:
    assert found_in(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        '"""See /run/quickthaw."""',
        'X = f"{root}/dev/shm"',
        'X = ("criu", "used")',
        'X = ".json"',
        'X = "..data"',
    ],
)
def test_this_test_leaves_other_text_alone(source: str) -> None:
    assert found_in(source) == []


def test_no_other_module_spells_a_path() -> None:
    again = [
        f"{path.relative_to(TOP)}:{line}"
        for path in modules()
        if path != Path(paths.__file__)
        for line in found_in(path.read_text())
    ]
    assert again == [], "take the name from shim.contract.paths"


def test_every_path_is_used() -> None:
    """Find names in paths.py that no module uses, other names in paths.py included."""
    used = {
        str(getattr(node, name))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        for kind, name in ((ast.Name, "id"), (ast.Attribute, "attr"), (ast.alias, "name"))
        if isinstance(node, kind) and not isinstance(getattr(node, "ctx", None), ast.Store)
    }
    assert set(CONSTANTS) - used == set()


def test_shell_parts_know_the_same_paths() -> None:
    """The shell parts cannot import: each of their paths must be a path of paths.py."""
    values = set(CONSTANTS.values())
    known = {*values, f"{paths.TICKETS}/ID.json", f"{paths.SWAPPED}/ID"}
    known |= {f"{paths.CONTAINERS}/ID/{paths.CONTAINER_NETWORK_PLAN}"}
    for name in SHELL:
        text = (TOP / name).read_text()
        found = re.findall(r"/(?:run|var/lib|etc)/quickthaw[\w./$-]*", text)
        alike = {re.sub(r"\$(?:2|quickthaw_id)", "ID", each) for each in found}
        assert alike <= known, name
    opened = (TOP / "hook/quickthaw-opened").read_text()
    assert f">{paths.CONTAINER_ASKED} " in opened
    assert f"<{paths.CONTAINER_ANSWERED} " in opened
    wire = (TOP / "gpu/preload/wire.h").read_text()
    assert f'#define QT_SOCKET "{paths.CONTROL_IN_CONTAINER}/{paths.GPU_SOCKET}"' in wire
