"""Store results in a folder next to the settings that they depend on, so that an interrupted run resumes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .json_files import check_unchanged, read_json
from .whole_files import make_folder, write_whole


class ResultFolder:
    """Store results in a folder, one JSON file each, and their settings in `settings.json`.

    A restarted run reads the finished results instead of recomputing them.

    Args:
        folder (`Path`): folder of the results, created with the first one.
        settings (`dict`): everything that the results depend on, as JSON values.
        holds (`str`): what the folder holds, for messages: "{folder} holds {holds} with seed=1; now it is 2."
        remedy (`str`): sentence that ends messages about the settings.

    Raises:
        ValueError: if the folder has results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], holds: str, remedy: str):
        self.folder, self.remedy = folder, remedy
        self.settings = json.loads(json.dumps(settings))  # as they are read back, with lists for tuples
        stored = self.get("settings", dict[str, Any])
        if stored is not None:
            check_unchanged(stored, self.settings, f"{folder} holds {holds}", remedy)

    def get(self, name: str, expected: Any = Any) -> Any:
        """Return a stored result, or None.

        Args:
            name (`str`): name of the result, which may contain folders: `a/b` is in `a/b.json`.
            expected (*optional*): type of the content, see [`misfit`].

        Raises:
            ValueError: if the file cannot be read or its content has another type.
        """
        path = self.folder / f"{name}.json"
        remedy = self.remedy if name == "settings" else "Delete this file to recompute it."
        return read_json(path, expected, remedy) if path.is_file() else None

    def put(self, name: str, value: Any) -> None:
        """Store a result atomically, after the settings."""
        if name != "settings" and self.get("settings") is None:
            self.put("settings", self.settings)
        path = self.folder / f"{name}.json"
        make_folder(path.parent)
        write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the stored result, or compute and store it."""
        if (value := self.get(name)) is None:
            value = compute()
            self.put(name, value)
        return value
