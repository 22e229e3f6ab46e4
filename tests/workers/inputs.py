"""Real inputs for the inference worker, with the right answers.

The pictures are drawn with Pillow, inside the image (`picture`); the other documents are files that
Debian ships in the workers' root file system. Outside of the image no library is needed.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PICTURES: Final[dict[str, list[str]]] = {
    "invoice": ["Invoice 2026-1123", "Total: 4711.50 EUR", "Due in 30 days"],
    "sign": ["NO PARKING", "Monday to Friday 8-18"],
    "parcel": ["Fragile: glass", "Weight 12.5 kg", "Room 407"],
}
# Path in the image, and the content type of the file.
DOCUMENTS: Final[dict[str, tuple[str, str]]] = {
    "program": ("usr/bin/true", "elf"),
    "source": ("usr/lib/python3.13/json/decoder.py", "python"),
    "script": ("usr/bin/ldd", "shell"),
    "certificate": ("etc/ssl/certs/ca-certificates.crt", "pem"),
}


@dataclass(frozen=True)
class Input:
    """A document, with the `label` and `text` of a right answer."""

    name: str
    document: bytes
    label: str
    text: tuple[str, ...] = ()

    def is_answered_by(self, answer: dict[str, object]) -> bool:
        """Whether an answer of /predict is right. Spaces may differ, letters may not."""
        read = answer.get("text")
        lines = read if isinstance(read, list) else []
        return answer.get("label") == self.label and _squeeze(lines) == _squeeze(list(self.text))


def _squeeze(lines: list[str]) -> list[str]:
    return ["".join(line.split()) for line in lines]


def picture(lines: list[str], width: int = 480) -> bytes:
    """Returns a PNG, black on white. Needs Pillow; its own font gives the same pixels anywhere."""
    from PIL import Image, ImageDraw, ImageFont

    size = 28
    font = ImageFont.load_default(size=size)
    step = size * 3 // 2
    image = Image.new("RGB", (width, 40 + len(lines) * step), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((20, 20 + number * step), line, fill="black", font=font)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write(root: str, directory: str) -> None:
    """Write all inputs and their answers into `directory`. root: the root of Debian's files."""
    index = []
    for name, lines in PICTURES.items():
        Path(directory, name).write_bytes(picture(lines))
        index.append({"name": name, "label": "png", "text": lines})
    for name, (path, label) in DOCUMENTS.items():
        Path(directory, name).write_bytes(Path(root, path).read_bytes())
        index.append({"name": name, "label": label, "text": []})
    Path(directory, "index.json").write_text(json.dumps(index, indent=1))


def read(directory: Path) -> list[Input]:
    """Returns the inputs that `write` made."""
    index = json.loads((directory / "index.json").read_text())
    return [
        Input(row["name"], (directory / row["name"]).read_bytes(), row["label"], tuple(row["text"]))
        for row in index
    ]


if __name__ == "__main__":
    write(*sys.argv[1:3])
