"""The documents name what exists: files, modules, targets, links, errors, metrics, annotations."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.contract import errors, paths
from shim.contract.errors import QuickthawError
from shim.contract.faults import POINTS
from shim.daemon.config import ROWS
from shim.gpu import support
from shim.workload.annotations import ANNOTATIONS, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
DOCUMENTS = [*TOP.glob("*.md"), *TOP.glob("docs/**/*.md")]
FOLDERS = "docs|gpu|hook|packaging|protos|shim|tests"
MODULES = {path.stem for path in TOP.glob("shim/**/*.py")}
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILES = ("gpu.lock", "gpu.sock", "gpu.json", "gpu.md")
"""Files of a container and of a measurement: they look like modules."""
HISTORY = ("CHANGELOG.md",)
"""Names of earlier versions have a place there."""
TARGETS = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.M))


def names(path: Path) -> str:
    return str(path.relative_to(TOP))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=names)


def missing(found: Iterator[str]) -> list[str]:
    return sorted(set(found))


@each_document
def test_files_and_folders_exist(path: Path) -> None:
    def absent() -> Iterator[str]:
        for name in CODE.findall(path.read_text()):
            if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]*", name) and not name.endswith("/TARGET"):
                place = TOP / name.rstrip("/")
                if not (place.exists() or place.with_name(f"{place.name}.py").exists()):
                    yield name

    assert missing(absent()) == []


@each_document
def test_modules_exist(path: Path) -> None:
    def absent() -> Iterator[str]:
        for name in re.findall(rf"`((?:{FOLDERS})\.[a-z][\w.]*)`", path.read_text()):
            if name not in POINTS and name not in FILES and not exists(name):
                yield name
        for name in re.findall(r"python3? -m ([a-z][\w.]*)", path.read_text()):
            if find_spec(name) is None:
                yield name

    assert missing(absent()) == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of a module."""
    try:
        if find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    return find_spec(module) is not None and hasattr(import_module(module), attribute)


@pytest.mark.parametrize("name", ["architecture.md", "gpu.md"])
def test_modules_in_brackets_exist(name: str) -> None:
    text = (TOP / "docs" / name).read_text()
    listed = re.findall(r"\(((?:`[a-z_]+`(?:, | and )?)+)\)", text)
    found = {each for group in listed for each in CODE.findall(group)}
    found |= set(re.findall(r"^- \*\*[^*]+\*\* \(`([a-z_]+)`", text, re.M))
    sources = {path.stem for path in TOP.glob("gpu/**/*.[chS]")}
    assert found - MODULES - sources == set()


@each_document
def test_targets_of_make_exist(path: Path) -> None:
    used = re.findall(r"`make ([a-z-]+)", path.read_text())
    used += re.findall(r"^make ([a-z-]+)", path.read_text(), re.M)
    assert set(used) - TARGETS == set()


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    def broken() -> Iterator[str]:
        for link in LINK.findall(path.read_text()):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield link

    assert missing(broken()) == []


def anchors(path: Path) -> set[str]:
    """Returns the anchors that a forge makes of the headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_document
def test_errors_exist_and_have_the_named_exit_status(path: Path) -> None:
    for name, status in re.findall(r"`([A-Z][A-Za-z]+)`(?:,| \() ?(\d\d)\b", path.read_text()):
        kind = getattr(errors, name)
        assert issubclass(kind, QuickthawError)
        assert kind.exit_code == int(status), name


@each_document
def test_metrics_exist(path: Path) -> None:
    source = "".join(each.read_text() for each in TOP.glob("shim/**/*.py"))
    used = re.findall(r"\bquickthaw_([a-z_]+)\b", path.read_text())
    known = {each for each in used if re.search(rf'"{each.removesuffix("_total")}"', source)}
    assert set(used) - known - {"hook"} == set()


@each_document
def test_annotations_exist(path: Path) -> None:
    used = re.findall(rf"{re.escape(PREFIX)}([a-z][a-z-]*)", path.read_text())
    assert set(used) - {row.name for row in ANNOTATIONS} == set()


@each_document
def test_fault_points_exist(path: Path) -> None:
    phases = "|".join({point.partition(".")[0] for point in POINTS})
    used = re.findall(rf"`((?:{phases})\.[a-z.]+)`", path.read_text())
    endings = {"json", "tree"}
    assert {each for each in used if each.rpartition(".")[2] not in endings} <= set(POINTS)


def test_decisions_name_the_modules_that_they_concern() -> None:
    for path in TOP.glob("docs/decisions/*.md"):
        concerned = CODE.findall(path.read_text().splitlines()[1])
        assert concerned
        bare = {each for each in concerned if not re.match(rf"(?:{FOLDERS})\b", each)}
        assert bare - MODULES == set(), path.name


def test_layers_in_architecture_are_the_layers_of_lint() -> None:
    contracts = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = [each["layers"] for each in contracts["contracts"] if each["type"] == "layers"]
    told = " → ".join(f"`{each.replace('shim.', '')}`" for each in layers)
    assert told in (TOP / "docs/architecture.md").read_text()


def test_table_of_steps_has_the_steps_of_a_swap() -> None:
    source = "".join(path.read_text() for path in TOP.glob("shim/restore/*.py"))
    text = (TOP / "docs/architecture.md").read_text()
    table = re.findall(r"^   \| (`[^|]*`) \|", text, re.M)
    told = [name for cell in table for name in CODE.findall(cell)]
    assert [name for name in told if f'"{name}"' not in source] == []
    assert set(re.findall(r'step\("(\w+)"\)', source)) <= set(told)


def test_table_of_refusals_has_every_row_of_the_capture() -> None:
    text = (TOP / "docs/operations.md").read_text()
    section = text[text.index("\n## GPUs") : text.index("\n## Keys")]
    assert re.findall(r"^\| `(gpu_\w+)` \|", section, re.M) == [row.code for row in support.ROWS]


def test_keys_of_the_configuration_exist() -> None:
    known = {row.name for row in ROWS}
    for path in DOCUMENTS:
        if path.name in HISTORY:
            continue
        for name in re.findall(r"`((?:max|keep|evict|restore|default|quarantine)_[a-z_]+)`",
                               path.read_text()):  # fmt: skip
            assert name in known | {"keep_free_"}, f"{path.name}: {name}"


def test_table_of_files_has_every_path_of_the_code() -> None:
    text = (TOP / "docs/architecture.md").read_text()
    section = text[text.index("\n## Files") : text.index("\n## Safety")]
    roots = (paths.RUN, paths.STORE, paths.ETC)
    known = {
        value
        for name, value in vars(paths).items()
        if name.isupper() and isinstance(value, str) and value.startswith(roots)
    }
    known -= {*roots, paths.CONTROL_IN_CONTAINER}
    assert [path for path in sorted(known) if not re.search(rf"\b{name_of(path)}\b", section)] == []


def name_of(path: str) -> str:
    return re.escape(path.rpartition("/")[2])
