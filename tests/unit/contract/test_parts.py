"""A snapshot's parts are listed once, and each row of the list is true."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from shim.contract import parts, paths
from shim.contract.manifest import Sizes
from shim.contract.parts import PARTS, SnapshotPart

TOP = Path(__file__).parents[3]
NAMES = {f"SNAPSHOT_{part.name.upper()}" for part in PARTS} | {part.name for part in PARTS}


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_row_names_a_constant_of_paths_and_a_module_that_makes_the_part(part: SnapshotPart) -> None:
    assert getattr(paths, f"SNAPSHOT_{part.name.upper()}") == part.name
    assert importlib.util.find_spec(part.maker) is not None
    assert part.checked in (parts.FIRST, parts.READ, parts.BESIDE)
    assert part.is_tree == (not part.flat)


def test_manifest_has_a_size_and_a_listing_of_each_part() -> None:
    assert set(Sizes.__slots__) == {part.name for part in PARTS} | {"entries"}
    sizes = Sizes(criu=1, rootfs=20, shm=300, memory=4000, entries=9)
    assert (sizes.total, [sizes.of(part) for part in PARTS]) == (4321, [1, 20, 300, 4000])
    assert len({part.listing for part in PARTS}) == len(PARTS)


def _names_in(node: ast.AST) -> set[str]:
    """Returns the parts that the elements of a display name, by constant or by string."""
    elements = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    found = {each.id for each in elements if isinstance(each, ast.Name)}
    found |= {str(each.value) for each in elements if isinstance(each, ast.Constant)}
    return {each.removeprefix("SNAPSHOT_").lower() for each in found & NAMES}


def test_no_other_module_lists_the_parts() -> None:
    """Find displays of three parts and more; a list of two is about these two."""
    again = [
        f"{path.relative_to(TOP)}:{node.lineno}"
        for folder in ("shim", "hook")
        for path in sorted((TOP / folder).rglob("*.py"))
        if path != Path(parts.__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict) and len(_names_in(node)) > 2
    ]
    assert again == [], "loop over shim.contract.parts.PARTS"
