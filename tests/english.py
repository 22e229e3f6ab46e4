"""`make lint`: the language of docstrings, messages and docs; see CONTRIBUTING.md, *Language*.

    python -m tests.english           fails for files with sentences that begin with a cleft
    python -m tests.english --count   prints the figures of each folder

The check cannot judge a sentence. It finds the habits that made earlier versions of this code hard
to read: sentences turned round by "what" and "who", pronouns in the place of nouns, passives.
"""

import argparse
import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).parents[1]
NOT_YET: Final[tuple[str, ...]] = ()
"""Folders that the rules have not reached. A folder that passes must leave the list."""
_TOLD: Final = ("help", "description", "why", "do")
"""Keywords whose texts people read: of argparse, and of QuickthawError."""
_TEXTS: Final = ("key", "Annotation", "note", "fail")
"""Calls whose texts people read: rows of the configuration and of annotations, lines of the CLI."""
_LEVELS: Final = ("debug", "info", "warning", "error", "exception", "critical")
_WORD: Final = re.compile(r"[A-Za-z][\w'-]*")
_CODE: Final = re.compile(r"(?s:```.*?```)|`[^`\n]*`|^[^\S\n]*\|[^\n]*$|^    [^\n]*$", re.MULTILINE)
_SENTENCE: Final = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*[-*|#]+\s*")
_BEGINS: Final = re.compile(r"(What|Who|Whoever|Whatever|Of what|Of which|Where\b[^,]*\bis)\b")
_CLEFT: Final = re.compile(r"\b(what|who|whoever|whatever)\b", re.IGNORECASE)
_PRONOUN: Final = re.compile(r"\b(it|its|one|ones|those)\b", re.IGNORECASE)
_PASSIVE: Final = re.compile(
    r"\b(is|are|was|were|be|been|being)\s+(?:not\s+|never\s+)?(\w+ed|known|made|taken|given|told|"
    r"found|written|read|seen|kept|left|held|put|sent|shown|done|gone|run|set|built|lost|cut)\b"
)


@dataclass(frozen=True, slots=True)
class Count:
    """Figures of a text, or of several together. `begins` has the wrong sentences."""

    words: int
    clefts: int
    pronouns: int
    passives: int
    begins: tuple[str, ...]

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.words + other.words,
            self.clefts + other.clefts,
            self.pronouns + other.pronouns,
            self.passives + other.passives,
            self.begins + other.begins,
        )

    def __str__(self) -> str:
        thousands = max(self.words, 1) / 1000
        return (
            f"{self.words} words; for 1,000: clefts {self.clefts / thousands:.1f}, pronouns "
            f"{self.pronouns / thousands:.1f}, passives {self.passives / thousands:.1f}; "
            f"sentences that begin with a cleft: {len(self.begins)}"
        )


NOTHING: Final = Count(0, 0, 0, 0, ())


def count(text: str) -> Count:
    """Returns the figures of `text`. Code, tables and indented blocks do not count."""
    prose = _CODE.sub(" ", text)
    sentences = (each.strip() for each in _SENTENCE.split(prose) if each)
    begins = [each for each in sentences if _BEGINS.match(each) and not each.endswith("?")]
    return Count(
        len(_WORD.findall(prose)),
        len(_CLEFT.findall(prose)),
        len(_PRONOUN.findall(prose)),
        len(_PASSIVE.findall(prose)),
        tuple(" ".join(each.split())[:90] for each in begins),
    )


def docstrings(source: str) -> Iterator[str]:
    """Yields the strings that stand alone in Python code: docstrings, also of attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            yield from [inspect.cleandoc(text)] if isinstance(text, str) else []


def messages(source: str) -> Iterator[str]:
    """Yields the texts in Python code that an operator reads: of help, errors and log calls."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {each.arg: each.value for each in node.keywords}
            told = [given[name] for name in _TOLD if name in given]
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if (owner == "log" and name in _LEVELS) or name in _TEXTS or "why" in given:
                told += node.args
            yield from (text for each in told if (text := literal(each)))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from (text for each in node.exc.args if (text := literal(each)))


def literal(node: ast.expr) -> str:
    """Returns a literal with X in the place of values; empty if the expression is no literal."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(each) for each in node.values)
    if isinstance(node, ast.FormattedValue):
        return "X"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def of_file(path: Path) -> Count:
    """Returns the figures of Markdown, or of the docstrings and messages in Python."""
    text = path.read_text()
    is_python = path.suffix == ".py"
    texts = [*docstrings(text), *messages(text)] if is_python else [text]
    return sum((count(each) for each in texts), NOTHING)


def measured() -> dict[str, Count]:
    """Returns the figures of each tracked file by its path, generated code left out."""
    command = ["git", "-C", str(TOP), "ls-files", "*.py", "*.md"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [each for each in listed if "_pb2" not in each and (TOP / each).is_file()]
    return {name: of_file(TOP / name) for name in names}


def folder(name: str) -> str:
    """Returns the folder under which a file counts: two levels in shim, else the first."""
    parts = name.split("/")[:-1]
    return "/".join(parts[: 2 if parts[:1] == ["shim"] else 1])


def complaints(files: dict[str, Count], not_yet: tuple[str, ...] = NOT_YET) -> list[str]:
    """Returns the lines that a person has to act on; none when all is well."""
    found = [
        f"{name}: begin the sentence with its actor: {sentence}"
        for name, figures in files.items()
        if folder(name) not in not_yet
        for sentence in figures.begins
    ]
    wrong = {folder(name) for name, figures in files.items() if figures.begins}
    done = (each for each in not_yet if each not in wrong)
    return found + [f"{each}: passes; take it off NOT_YET in tests/english.py" for each in done]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.english")
    parser.add_argument("--count", action="store_true")
    files = measured()
    if parser.parse_args().count:
        for each in sorted({folder(name) for name in files}):
            inside = (figures for name, figures in files.items() if folder(name) == each)
            print(f"{each or '.'}: {sum(inside, NOTHING)}")
        print(f"all: {sum(files.values(), NOTHING)}")
        return 0
    found = complaints(files)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
