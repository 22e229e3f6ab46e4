"""Print preload/functions.h from a cuda.h: `functions.py CUDA.H`.

A line of it is a function of the driver's API by the name that libcuda exports, and the number of
words of arguments that a caller may have put on the stack: the first six travel in registers.
"""

import re
import sys
from pathlib import Path

DECLARED = re.compile(r"CUresult\s+CUDAAPI\s+(\w+)\s*\(([^;]*?)\)\s*;", re.S)
RENAMED = re.compile(
    r"#define\s+(cu[A-Z]\w*)\s+(?:__CUDA_API_(PTDS|PTSZ)\()?(cu[A-Z]\w*)\)?\s*$", re.M
)
BY_VALUE = re.compile(r"\b(CUipc\w+Handle)\s+\w+\s*(?:,|$)")
"""Structures of 64 octets, which go on the stack; the others by value are of 8."""
IN_REGISTERS = 5  # one less than six: a structure of 16 octets takes two
ON_STACK = 12


def functions(text: str) -> dict[str, int]:
    """Names and words on the stack."""
    found: dict[str, int] = {}
    for name, arguments in DECLARED.findall(text):
        many = arguments.count(",") + 1 > IN_REGISTERS or BY_VALUE.search(arguments)
        found[name] = max(found.get(name, 0), ON_STACK if many else 0)
    for name, kind, target in RENAMED.findall(text):
        for each in (target, f"{target}_{kind.lower()}" if kind else target):
            found[each] = max(found.get(each, 0), found.get(name, 0))
    return dict(sorted(found.items()))


if __name__ == "__main__":
    lines = ["/* Made by functions.py from cuda.h: name, words of arguments on the stack. */"]
    found = functions(Path(sys.argv[1]).read_text())
    lines += [f"QT_FUNCTION({name}, {words})" for name, words in found.items()]
    sys.stdout.write("\n".join(lines) + "\n")
