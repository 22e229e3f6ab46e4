"""docs/formats.md agrees with the code: parsers read its examples, and its tables are complete."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shim.cli import client
from shim.contract import faults, journal, jsontext, manifest, outcome, ticket
from shim.contract.paths import CONTAINER_GPU_LOCK, FAULTS, GPU_PAYLOAD, WORKING_SETS
from shim.gate import volumecontent
from shim.gpu import payload
from shim.gpu.direct import mover, wire
from shim.integrity import marks, tree
from shim.memory import layout
from shim.memory.serve import workingset
from shim.restore import resume
from shim.source import record
from shim.store import quarantine
from shim.trust import keyfile, signature
from tests.unit.formatsdoc import (
    DOCUMENT,
    EXAMPLES,
    FORMATS,
    SECTIONS,
    TEXT,
    inside,
    octets,
    parsed,
    rows,
    top,
)
from tests.unit.manifests import made

if TYPE_CHECKING:
    from pathlib import Path

SCHEMAS = {
    "Manifest": manifest.SCHEMA, "Signature": signature.SCHEMA, "Memory layout": layout.SCHEMA,
    "Working set": workingset._SCHEMA, "Quarantine record": quarantine.SCHEMA,
    "Health record": quarantine.SCHEMA, "Ticket": ticket.SCHEMA, "Pod records": record._SCHEMA,
    "Marks and seals": marks._SCHEMA, "Library of the way direct": wire.VERSION,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_names_place_writer_reader_and_version(name: str) -> None:
    for word in ("Place", "Version"):
        assert f"- **{word}:**" in SECTIONS[name]
    assert re.search(r"- \*\*(Written by|Written by and read by)\*\*", SECTIONS[name])
    assert re.search(r"\*\*(Read by|Written by and read by)\*\*", SECTIONS[name])


def test_overview_has_every_format_and_its_version() -> None:
    table = dict(re.findall(r"^\| \[[^]]+\]\(#([\w-]+)\) \| [^|]+ \| ([^|]+) \|", TEXT, re.M))
    assert list(table) == [name.lower().replace(" ", "-") for name in FORMATS]
    for name, number in SCHEMAS.items():
        assert table[name.lower().replace(" ", "-")] == str(number)


@pytest.mark.parametrize(("name", "number"), SCHEMAS.items())
def test_version_is_the_number_in_the_code(name: str, number: int) -> None:
    assert f"- **Version:** {number}" in SECTIONS[name]


def test_no_module_has_a_version_that_the_document_lacks() -> None:
    root = DOCUMENT.parents[1]
    named = re.compile(r"^_?(SCHEMA|VERSION)(: Final)? = (\d+)$", re.M)
    modules = {path for path in root.glob("shim/**/*.py") if named.search(path.read_text())}
    known = {
        layout, manifest, marks, outcome, quarantine, record, signature, ticket, wire, workingset,
    }  # fmt: skip
    of_document = {root / (each.__name__.replace(".", "/") + ".py") for each in known}
    in_journal = {root / "shim/rootfs/overlay.py"}
    assert modules - in_journal <= of_document


def test_examples_have_the_version_of_their_section() -> None:
    for name, text in SECTIONS.items():
        stated = re.search(r"- \*\*Version:\*\* (\d+)", text)
        if stated is not None:
            assert set(re.findall(r'"schema": ?(\d+)', text)) <= {stated[1]}, name


def test_manifest() -> None:
    found = manifest.decode(EXAMPLES["manifest"].encode())
    assert top("Manifest") == {"schema", *manifest.Manifest._parsers}
    for name in ("source", "software", "sizes", "requires"):
        assert inside("Manifest", name) == set(getattr(found, name)._parsers)
    assert inside("Manifest", "files") == set(found.files[0]._parsers)
    assert inside("Manifest", "network") == set(found.network)
    assert GPU_PAYLOAD in SECTIONS["Manifest"]


_FACTS = """
import json
from hook import netlink
netlink.bring_up_loopback()
print(json.dumps(netlink.facts()))
"""


def test_network_of_a_manifest_is_the_hooks() -> None:
    program = ["unshare", "-n", sys.executable, "-c", _FACTS]
    facts = json.loads(subprocess.check_output(program, cwd=DOCUMENT.parents[1]))
    assert inside("Manifest", "network") == {*facts, "bound_addresses", "patches"}
    example = parsed("manifest")["network"]
    for name in ("links", "addresses", "routes"):
        assert facts[name]
        fields = set(example[name][0])
        assert all(set(each) == fields for each in facts[name])
        row = re.search(rf"\| `network.{name}` \| list \| .* each with (.*) \|", TEXT)
        assert row is not None
        assert set(re.findall(r"`(\w+)`", row[1])) == fields


def test_signature_is_by_the_key_over_the_manifest() -> None:
    found = manifest.decode(EXAMPLES["manifest"].encode())
    key = keyfile.parse_public(EXAMPLES["key"].encode() + b"\n")
    signed = signature.decode(EXAMPLES["signature"].encode() + b"\n")
    assert signed.is_of(found, key)
    assert top("Signature") == set(parsed("signature"))
    assert signature._PURPOSE.decode().strip() in SECTIONS["Signature"]


def test_listing() -> None:
    lines = EXAMPLES["listing"].splitlines()
    assert [tree.Line(line.encode()).name for line in lines] == [
        ".", "etc", "motd", "motd.new", "mtab",
    ]  # fmt: skip
    for line in lines:
        *attributes, digests, verity = jsontext.parse(line)
        assert tree.encode(attributes, digests, verity).decode() == f"{line}\n"
    assert rows("Listing") == [*tree._FIELDS, "digests", "verity"]
    assert len(rows("Listing")) == tree._FIELD_COUNT
    listed = {each.path: each for each in manifest.decode(EXAMPLES["manifest"].encode()).files}
    assert listed["rootfs.tree"].size == len(EXAMPLES["listing"]) + 1
    assert set(re.findall(r"`(\w+\.tree)`", SECTIONS["Listing"])) == set(listed)


def test_memory_layout() -> None:
    ranges = octets("ranges")
    assert layout.decode_ranges(ranges) == [(0x1600000000, 0x1600001000, 0)]
    example = parsed("layout")
    sizes = {"space-1.data": 4096, "shared-7.data": 8192}
    files = {
        "layout.json": EXAMPLES["layout"].encode(), "space-1.ranges": ranges,
        "shared-7.ranges": layout.encode_ranges([(0, 8192, 0)]),
    }  # fmt: skip
    found = layout.decode(files, sizes)
    assert (found.spaces[0].pid, found.shared[0].size) == (1, 8192)
    assert top("Memory layout") == set(example)
    for name in ("spaces", "shared"):
        fields = inside("Memory layout", name)
        assert fields == set(example[name][0])
        for field in fields:  # the reader needs every field of the document, and no other
            less = jsontext.parse(EXAMPLES["layout"])
            del less[name][0][field]
            with pytest.raises(layout.BadLayout):
                layout.decode({**files, "layout.json": json.dumps(less).encode()}, sizes)
    with pytest.raises(layout.BadLayout):
        layout.decode(
            {**files, "layout.json": json.dumps({**example, "schema": 2}).encode()}, sizes
        )


def test_gpu_payload() -> None:
    found = payload.of({GPU_PAYLOAD: EXAMPLES["payload"]})
    assert found is not None
    assert found.encode() == EXAMPLES["payload"]
    assert top("GPU payload") == set(payload._FIELDS)
    assert inside("GPU payload", "gpus") == set(payload._OF_GPU)
    assert (found.about["chunk"], found.about["files"]) == (mover.CHUNK_BYTES, mover.FILES)


def test_working_set(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(EXAMPLES["working-set"])
    assert workingset.read("x", str(tmp_path)) == [(1, 94489280512), (7, 140737353744384)]
    assert top("Working set") == set(parsed("working-set"))
    assert f"{workingset._MAX_WINDOWS:,}" in SECTIONS["Working set"]
    assert WORKING_SETS in SECTIONS["Working set"]


@pytest.mark.parametrize(
    ("section", "label", "kind"),
    [
        ("Quarantine record", "quarantine", quarantine.Record),
        ("Health record", "health", quarantine.Health),
    ],
)
def test_records_of_the_store(
    section: str, label: str, kind: type[quarantine.Record] | type[quarantine.Health]
) -> None:
    quarantine.decode(EXAMPLES[label].encode(), kind)
    assert top(section) == set(parsed(label)) == {"schema", *kind.__dataclass_fields__}


def test_ticket() -> None:
    found = ticket.decode(EXAMPLES["ticket"].encode())
    assert found.others == 0
    assert rows("Ticket") == ["schema", *ticket._FIELDS]


def test_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(outcome, "write", lambda _container, found: written.append(found))
    wanted = ticket.decode(EXAMPLES["ticket"].encode())
    error: Any = client.error_of({"class": "MemoryLost", "what": "it is lost"})
    outcome.write_killed(wanted, error)
    (found,) = written
    fields = set(found if isinstance(found, dict) else jsontext.parse(found.encode()))
    assert fields | {"schema", "deadline_s"} == top("Outcome") == set(parsed("outcome"))
    assert inside("Outcome", "pod") == set(ticket.pod_of(wanted))
    for word in (outcome.RESTORED, outcome.COLD, outcome.KILLED, outcome.REFUSED):
        assert f"`{word}`" in SECTIONS["Outcome"]
    (tmp_path / "c1.json").write_text(EXAMPLES["outcome"])
    assert outcome.take("c1", str(tmp_path)) is not None


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text(f"{EXAMPLES['journal']}\n")
    kinds = [kind for kind, _ in journal.changes(str(path))]
    named = {
        journal.ROOTFS, journal.RUNTIME, journal.SHM, journal.SHM_PLACED, journal.SHM_UNDONE,
        journal.NETNS, journal.ADDRESS, journal.DONE, journal.FROZEN, journal.GPU,
    }  # fmt: skip
    assert set(rows("Journal", "kind")) == named
    assert set(kinds) <= named
    other = {
        value
        for name, value in vars(journal).items()
        if name.isupper() and not name.startswith(("_", "CONTAINER")) and isinstance(value, str)
    }
    assert other - named == {journal.THAW, journal.CHECKPOINT}
    swap = inspect.signature(journal.lock).parameters["name"].default
    for lock in (swap, journal.THAW, journal.CHECKPOINT, CONTAINER_GPU_LOCK):
        assert f"`{lock}`" in SECTIONS["Journal"]


def test_journal_describes_an_overlay_as_the_code_does() -> None:
    (row,) = [line for line in SECTIONS["Journal"].splitlines() if line.startswith("The subject")]
    told = re.findall(r"`(\w+)`", row)[1:]
    root = DOCUMENT.parents[1] / "shim/rootfs"
    fields = typed(root / "overlay.py", "Described") + typed(root / "topdir.py", "TopAttributes")
    assert told == fields


def typed(path: Path, name: str) -> list[str]:
    """Returns the fields of a TypedDict, which exists for the type checker alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [
                ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)
            ]
    raise AssertionError(f"{path} has no {name}")


def test_pod_records() -> None:
    found = record.parsed(parsed("pod-record"))
    assert found.is_whole
    assert top("Pod records") == set(parsed("pod-record"))
    for name in (record.BEFORE, record.OTHERS):
        assert f"`{name}`" in SECTIONS["Pod records"]


def test_content_of_volumes() -> None:
    example = parsed("volume-content")
    assert jsontext.canonical(example) == EXAMPLES["volume-content"]
    assert all(re.fullmatch("content [0-9a-f]{16}", value) for value in example.values())
    assert volumecontent.NOT_READ in SECTIONS["Content of volumes"]


def test_plan_of_the_hook() -> None:
    root = DOCUMENT.parents[1]
    readers = [root / "hook/prestart.py", *root.glob("shim/network/*.py")]
    source = "".join(path.read_text() for path in readers)
    assert set(re.findall(r'plan\["(\w+)"\]', source)) == top("Plan of the hook")
    assert set(parsed("plan")) == top("Plan of the hook")


def test_marks_and_seals(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for part, line in zip(("memory", "shm"), EXAMPLES["marks"].splitlines(), strict=True):
        (tmp_path / "x" / part).write_text(line)
        found = marks.read("x", part, str(tmp_path))
        assert [len(mark) for mark in found.values()] == [1 if part == "shm" else 5]
        marks.write("x", part, found, str(tmp_path))
        assert (tmp_path / "x" / part).read_text() == line
        assert top("Marks and seals") == set(jsontext.parse(line))


def test_armed_faults() -> None:
    try:
        assert faults.arm(EXAMPLES["faults"]) == []
    finally:
        faults.disarm()
    assert inside("Armed faults", "faults") == set(parsed("faults")["faults"][0])
    assert FAULTS in SECTIONS["Armed faults"]
    assert faults.VARIABLE in SECTIONS["Armed faults"]
    assert all(f"`{action}`" in SECTIONS["Armed faults"] for action in faults.ACTIONS)


def test_restored_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "CONTROL", str(tmp_path))
    wanted = ticket.decode(EXAMPLES["ticket"].encode())
    (tmp_path / wanted.container).mkdir()
    bundle: Any = SimpleNamespace(spec={}, environment={}, owner=(-1, -1), hostname="h")
    resume.tell(wanted, made(), bundle, ["10.0.0.1"])
    told = json.loads((tmp_path / wanted.container / "restored.json").read_text())
    assert top("Files for the workload") == set(told) == set(parsed("restored"))
    assert f"- **Version:** {told['schema']} " in SECTIONS["Files for the workload"]
