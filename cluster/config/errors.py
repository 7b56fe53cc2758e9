"""What is wrong with a configuration, said so that it can be put right."""

from __future__ import annotations


class ConfigError(ValueError):
    """Every problem found, one a line: the key, its value, where it came from and what is allowed."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)
