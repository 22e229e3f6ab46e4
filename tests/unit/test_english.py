"""The language check of `make lint` finds clefts, but not in code or questions."""

import pytest

from tests import english

WRONG = [
    "What is left is removed.",
    "The daemon starts. Who asked is told.",
    "Of what was read nothing is kept.",
    "Where the file lies is the ticket's business.",
]
RIGHT = [
    "Removes the rest.",
    "What is left?",
    "Where a pod has no network, the plan is empty.",
    "Runs `What is that` in a shell.",
    "Whatsoever",
]


@pytest.mark.parametrize("text", WRONG)
def test_sentence_that_begins_with_a_cleft_is_found(text: str) -> None:
    assert len(english.count(text).begins) == 1


@pytest.mark.parametrize("text", RIGHT)
def test_other_sentences_pass(text: str) -> None:
    assert english.count(text).begins == ()


def test_all_kinds_of_docstrings_are_read() -> None:
    source = '"""A."""\nX = 1\n"""B."""\ndef f():\n    """C."""\n    return "no"\n'
    assert sorted(english.docstrings(source)) == ["A.", "B.", "C."]


def test_messages_that_an_operator_reads_are_found() -> None:
    source = """
parser.add_argument("x", help="A")
log.warning("B %s", other("no"))
raise OSError(5, f"C {x}")
error = NoRoom("D", about="no", why=f"E {x:g}", do="F")
limit: int = key(1, count, "G")
print("no")
"""
    assert sorted(filter(None, english.messages(source))) == [
        "A", "B %s", "C X", "D", "E X", "F", "G"
    ]  # fmt: skip


def test_file_in_a_finished_folder_is_held_to_the_rule() -> None:
    files = {"shim/gate/a.py": english.count(WRONG[0]), "shim/nri/b.py": english.count(WRONG[0])}
    (line,) = english.complaints(files, not_yet=("shim/nri",))
    assert line.startswith("shim/gate/a.py: ")


def test_folder_that_passes_must_leave_the_list_of_exceptions() -> None:
    assert english.complaints({"shim/nri/b.py": english.NOTHING}, not_yet=("shim/nri",)) == [
        "shim/nri: passes; take it off NOT_YET in tests/english.py"
    ]


def test_prose_behind_a_table_and_an_example_counts() -> None:
    text = (
        "A.\n\n| What | b |\n\n    What code\n\n```\nWhat code\n```\n\nWhat is left is removed.\n"
    )
    assert english.count(text).begins == ("What is left is removed.",)
