"""The documents' limits and defaults are the code's."""

import inspect
import re
from pathlib import Path

import pytest

from shim.capture import dump
from shim.contract import limits
from shim.daemon import adjust, config, control, oneline, watch
from shim.daemon.config import Config
from shim.gate import facts, refusal, volumecontent
from shim.gpu import engine, support
from shim.integrity import chunks, marks, tree, work
from shim.kernel import othermemory, priority
from shim.kube import event, sender
from shim.memory.copy import forked, memorycopy
from shim.memory.serve import bursts, filling, guard, space
from shim.node import tool
from shim.restore import logs
from shim.shm import precopy
from shim.source import ghosts, record
from shim.store import quarantine
from tests.bench import plan

TOP = Path(__file__).parents[2]
KIB, MIB = 1 << 10, 1 << 20
UNIT = (TOP / "packaging/systemd/quickthawd.service").read_text()
INODES = re.search(r"size=(\d+)m,nr_inodes=(\d+)", adjust._CONTROL_OPTIONS)
BURST = inspect.signature(event.Rate).parameters

SECURITY, OPERATIONS = "docs/security.md", "docs/operations.md"
ARCHITECTURE, FORMATS, README = "docs/architecture.md", "docs/formats.md", "README.md"

LIMITS = [
    (SECURITY, f"a spec of more than {limits.MAX_SPEC_BYTES // MIB} MiB"),
    (SECURITY, f"more than {facts._MOST_CHARS // KIB} Ki characters by its digest"),
    (FORMATS, f"more than {facts._MOST_CHARS // KIB} Ki characters is its digest"),
    (SECURITY, f"at most {refusal._MOST_CHARS} characters of a value"),
    (SECURITY, f"a line of the journal {oneline._MOST_CHARS // KIB} Ki"),
    (SECURITY, f"a step above {watch.SLOW_S * 1000:.0f} ms of processor time"),
    (OPERATIONS, f"A step above {watch.SLOW_S * 1000:.0f} ms of processor time"),
    (SECURITY, f"(none of {ghosts._NEEDS_CHMOD:05o})"),
    (SECURITY, f"images of content from {tree.BIG_DATA_BYTES // KIB} KiB on"),
    (SECURITY, f"together may have {tree.MOST_IMAGE_BYTES // MIB} MiB"),
    (SECURITY, f"{othermemory.MAX_BYTES // MIB} MiB at most for each fork"),
    (SECURITY, f"an `oom_score_adj` of {priority._EXPENDABLE}"),
    (SECURITY, f"at most {limits.MAX_ENTRIES:,} entries, a depth of {limits.MAX_DEPTH} "),
    (SECURITY, f"{limits.MAX_PATH_BYTES:,} bytes of path to a directory"),
    (SECURITY, f"{limits.MAX_LISTING_BYTES // MIB} MiB of listing"),
    (FORMATS, f"at most {limits.MAX_LISTING_BYTES // MIB} MiB each"),
    (SECURITY, f"has at most {limits.MAX_SHM_ENTRIES:,} entries"),
    (SECURITY, f"An entry counts {limits.ENTRY_BYTES // KIB} KiB"),
    (SECURITY, f"more than {limits.MAX_OPENED:,} descriptors and mappings"),
    (SECURITY, f"({record._MOST_ENTRIES:,} names in `/dev/shm`"),
    (SECURITY, f"more than {record._MOST_ENTRIES:,} entries), no object counts"),
    (SECURITY, f"keeps at most {tool._MOST_BYTES // MIB} MiB of their output"),
    (SECURITY, f"{(logs._BEGIN_BYTES + logs._END_BYTES) // MIB} MiB of a log"),
    (SECURITY, f"{logs.MOST_BYTES // MIB} MiB of all"),
    (ARCHITECTURE, f"at most {logs.MOST_BYTES // MIB} MiB for all"),
    (OPERATIONS, f"at most {limits.MAX_ENTRIES:,} entries in the writable layer"),
    (OPERATIONS, f"{limits.MAX_SHM_ENTRIES:,} in `/dev/shm`, a depth of {limits.MAX_DEPTH}"),
    (OPERATIONS, f"{limits.MAX_PATH_BYTES:,} bytes of path"),
    (OPERATIONS, f"Each entry counts {limits.ENTRY_BYTES // KIB} KiB"),
    (OPERATIONS, f"more than {volumecontent._MAX_FILES:,} files or "
                 f"{volumecontent._MAX_BYTES // MIB} MiB"),
    (OPERATIONS, f"If {dump._FROZEN_S:.0f} s plus an estimate for its memory "
                 f"({(1 << 30) // dump._COMPARED_BYTES_PER_S} s for each GiB)"),
    (OPERATIONS, f"hashes chunks of {chunks.CHUNK_BYTES // MIB} MiB"),
    (OPERATIONS, "on up to four threads"),
    (OPERATIONS, f"up to {engine._LOCK_S:.0f} s (`GpuNotCheckpointed`"),
    (OPERATIONS, f"The driver must be {support.OLDEST_DRIVER} or later"),
    (README, f"with driver {support.OLDEST_DRIVER} or later"),
    (OPERATIONS, f"at most {BURST['burst'].default} at once for a pod and then one a minute"),
    (OPERATIONS, f"{sender._QUEUE} events wait while the server is away"),
    (OPERATIONS, f"at most every {sender._TELL_EVERY_S / 60:.0f} minutes"),
    (OPERATIONS, "kubelet, which waits for the daemon no longer than 30 s"),
    (ARCHITECTURE, f"page faults first, {space.AROUND_BYTES // KIB} KiB at a time"),
    (ARCHITECTURE, f"fill the rest, {filling.PIECE_BYTES // MIB} MiB at a time"),
    (ARCHITECTURE, f"for longer than {bursts.BURST_S * 1000:.0f} ms"),
    (ARCHITECTURE, "does not move for five seconds"),
    (ARCHITECTURE, f"Below {forked.WORTH_BYTES // MIB} MiB each process has its own copy"),
    (ARCHITECTURE, f"files of {precopy.MUCH_BYTES // MIB} MiB and more"),
    (FORMATS, f"at most {control.MAX_REQUEST_BYTES // KIB} KiB, within {control.REQUEST_S:.0f} s"),
    (FORMATS, f"{control._MOST_AT_ONCE} requests are served at the same time"),
    (FORMATS, f"at most {quarantine._MAX_REASON:,} characters"),
    (FORMATS, f"the latest last, at most {quarantine._MAX_CAUSES}"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "words"), LIMITS, ids=lambda each: each[:60])
def test_document_has_the_limit_of_the_code(path: str, words: str) -> None:
    assert words in (TOP / path).read_text()


def test_words_of_the_table_stand_for_the_constants() -> None:
    assert work.THREADS <= 4
    assert memorycopy._THREADS <= 8
    assert guard._STALLED_TICKS * guard.TICK_S == 5
    assert BURST["refill_s"].default == 60
    assert "TimeoutStartSec=30\n" in UNIT
    assert marks.SETTLED_NS == 50_000_000


@pytest.mark.parametrize("path", [SECURITY, ARCHITECTURE])
def test_control_directory_is_as_small_as_the_document_says(path: str) -> None:
    assert INODES is not None
    assert f"of {INODES[1]} MiB and {INODES[2]} inodes" in (TOP / path).read_text()


def test_unit_has_the_settings_that_the_documents_name() -> None:
    for path in (SECURITY, OPERATIONS):
        for name, value in re.findall(r"`([A-Z][A-Za-z]+)=(\w+)`", (TOP / path).read_text()):
            assert f"\n{name}={value}\n" in UNIT
    assert "\nRestartPreventExitStatus=52\n" in UNIT
    assert "LimitCORE=0" in UNIT


def rows() -> dict[str, str]:
    """Returns key to default of the table of limits in operations.md."""
    text = (TOP / OPERATIONS).read_text()
    section = text[text.index("\n## Limits") : text.index("\n## Quarantine")]
    return dict(re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", section, re.M))


def test_defaults_of_the_table_are_the_defaults_of_the_configuration() -> None:
    known = {row.name: row.default for row in config.ROWS}
    found = rows()
    assert len(found) > 8
    for keys, cell in found.items():
        names = re.findall(r"`(\w+)`", keys)
        values = [each.strip() for each in re.split(r", ", cell)]
        assert len(names) == len(values), keys
        for name, value in zip(names, values, strict=True):
            default = known[name]
            if isinstance(default, bool):
                assert value == str(default).lower(), name
            else:
                assert float(re.split(r"[ :]", value)[0]) == float(str(default)), name


def test_prose_has_the_defaults_of_the_configuration() -> None:
    text = (TOP / OPERATIONS).read_text()
    assert (
        f"`quarantine_after` restores in a row failed (default {Config().quarantine_after}" in text
    )
    changes = (TOP / "CHANGELOG.md").read_text()
    assert f"(`frozen_limit_s`, {Config().frozen_limit_s:.0f} s)" in changes


def test_variables_of_the_bench_have_their_defaults() -> None:
    text = (TOP / "docs/benchmarks.md").read_text()
    assert dict(re.findall(r"^\| `([A-Z]+)` \| `([^`]+)` \|", text, re.M)) == plan.FULL
