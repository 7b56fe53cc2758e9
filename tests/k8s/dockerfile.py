"""A Dockerfile, taken apart. Builds nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """One instruction."""

    word: str
    text: str


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next."""

    name: str
    steps: tuple[Step, ...]

    def all(self, word: str) -> list[str]:
        return [step.text for step in self.steps if step.word == word]

    def variables(self) -> dict[str, str]:
        """Of ENV; values have no spaces here."""
        return dict(pair.split("=", 1) for text in self.all("ENV") for pair in text.split())

    def command(self) -> list[str]:
        """CMD, which is JSON or a shell's."""
        [text] = self.all("CMD")
        return json.loads(text)


def stages(file: Path) -> list[Stage]:
    """In order; the last one is the image."""
    joined = re.sub(r"\\\n\s*", " ", file.read_text())
    steps = [Step(*line.split(None, 1)) for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    begins = [number for number, step in enumerate(steps) if step.word == "FROM"]
    ends = [*begins[1:], len(steps)]
    return [
        Stage(steps[begin].text.rpartition(" AS ")[2] if " AS " in steps[begin].text else "", tuple(steps[begin:end]))
        for begin, end in zip(begins, ends, strict=True)
    ]
