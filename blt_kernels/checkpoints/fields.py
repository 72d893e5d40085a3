"""The JSON of published checkpoints: fields that name themselves and their file when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..training.checkpoint import CheckpointError, reading


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, no JSON, or no object.
    """
    with reading(file):
        if not file.exists():
            raise CheckpointError(f"{file}: missing")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: expected a JSON object, got a {type(values).__name__}")
        return values


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class Fields:
    """An object in a JSON file, with what its absent keys mean.

    Args:
        file: for error messages.
        values: the object.
        defaults: what absent keys mean.
        section: the key of the object in the file, for error messages.
    """

    def __init__(self, file: Path, values: dict[str, Any], defaults: dict[str, Any] | None = None, section: str = ""):
        self._file, self._values, self._defaults, self._section = file, values, defaults or {}, section

    def __getitem__(self, name: str) -> Any:
        """Raises CheckpointError where the key is absent and that has no meaning."""
        if name in self._values:
            return self._values[name]
        if name not in self._defaults:
            raise CheckpointError(f"{self._file}: {self._section}{name}: missing")
        return self._defaults[name]

    def __bool__(self) -> bool:
        """Whether the file has any of these fields."""
        return bool(self._values)

    def with_defaults(self, defaults: dict[str, Any]) -> Fields:
        """The same fields, with what their absent keys mean."""
        return Fields(self._file, self._values, defaults, self._section)

    def has(self, name: str) -> bool:
        """Whether the file has a value under `name` that is not null."""
        return self.get(name) is not None

    def get(self, name: str) -> Any:
        """The value in the file, or None."""
        return self._values.get(name)

    def section(self, name: str, defaults: dict[str, Any] | None = None) -> Fields:
        """The object under `name`; an absent one has absent keys alone."""
        values = self._values.get(name)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise self.error(name, "a JSON object", values)
        return Fields(self._file, values, defaults, f"{self._section}{name}.")

    def renamed(self, names: dict[str, str]) -> Fields:
        """Fields by other names: those of `names`, from the fields that they stand for."""
        return Fields(self._file, {name: self[old] for name, old in names.items()}, {}, self._section)

    def error(self, name: str, expected: str, got: Any) -> CheckpointError:
        return CheckpointError(f"{self._file}: {self._section}{name}: expected {expected}, got {got!r}")

    def expect(self, name: str, *accepted: Any, why: str) -> None:
        """Refuses every value of `name` but `accepted`; the reason is a clause about our model."""
        if self[name] not in accepted:
            raise self.error(name, " or ".join(map(repr, accepted)) + f", because {why}", self[name])
