"""The gate chooses the first candidate that fits, and tells why none does."""

from __future__ import annotations

from shim.gate import decide as gate
from shim.gate.refusal import UNKNOWN, Finding
from tests.unit.specs import captured, spec, wanted


def refusal_of(code: str, have: str | None, want: str | None) -> Finding:
    return Finding(code, 2, have, want, False)


def test_first_fitting_candidate_is_chosen() -> None:
    unfit, fit, older = captured(key="f" * 64), captured(), captured(created_at=1.0)
    decided = gate.decide(wanted(), [unfit, fit, older])
    assert isinstance(decided, gate.Match)
    assert decided.manifest == fit


def test_no_candidate_is_no_snapshot() -> None:
    assert isinstance(gate.decide(wanted(), []), gate.NoSnapshot)


def test_refusal_has_all_reasons_of_the_newest_candidate() -> None:
    process = {**spec("2")["process"], "noNewPrivileges": False, "args": ["other"]}
    request = wanted({**spec("2"), "process": process}, namespace="else")
    decided = gate.decide(request, [captured(), captured(created_at=1.0)])
    assert isinstance(decided, gate.Refused)
    assert decided.snapshot == captured().id
    assert decided.codes == ["no_new_privs", "args", "namespace"]
    assert all(code in str(decided) for code in decided.codes)


def test_refusal_shows_only_the_differing_entries_of_lists_and_objects() -> None:
    refusal = refusal_of("mounts", '["a","b"]', '["b","c"]')
    assert str(refusal) == 'mounts: the snapshot has ["a"], the pod asks for ["c"]'
    refusal = refusal_of("env", '{"A":"1","B":"2"}', '{"A":"1","B":"3","C":"4"}')
    assert str(refusal) == 'env: the snapshot has {"B":"2"}, the pod asks for {"B":"3","C":"4"}'
    refusal = refusal_of("capabilities", '{"bounding":["A","B"]}', '{"bounding":["A"]}')
    assert '{"bounding":["B"]}, the pod asks for {"bounding":[]}' in str(refusal)
    in_order = refusal_of("args", '["a","b"]', '["b","a"]')
    assert str(in_order) == 'args: the snapshot has ["a","b"], the pod asks for ["b","a"]'
    assert "has true, the pod asks for false" in str(refusal_of("terminal", "true", "false"))
    assert f"has {UNKNOWN}, the pod" in str(refusal_of("user", None, "{}"))
