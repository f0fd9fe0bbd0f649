"""Results of an evaluation that is not finished yet, kept on disk part by part."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..files.json_files import check_unchanged, read_json
from ..files.whole_files import make_folder, write_whole


class Parts:
    """Parts of an evaluation, each a JSON file in a folder, so that a run that was stopped computes none again.

    Args:
        folder (`Path`): holds the parts; made with the first one.
        settings (`dict`): what the parts depend on, JSON values.

    Raises:
        ValueError: if the folder has parts that were made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        found = self.get("settings")
        if found is not None:
            mend = "Delete this folder, or name another with --output_dir."
            check_unchanged(found, self.settings, f"{folder} holds an unfinished evaluation", mend)

    def get(self, name: str) -> Any:
        """The part of that name, or None."""
        path = self.folder / f"{name}.json"
        mend = "Delete this file, and the part is computed again."
        return read_json(path, dict[str, Any] if name == "settings" else Any, mend) if path.is_file() else None

    def put(self, name: str, value: Any) -> None:
        """Keep a part; it is there whole or not at all."""
        make_folder(self.folder)
        if name != "settings" and not (self.folder / "settings.json").is_file():
            self.put("settings", self.settings)
        write_whole(self.folder / f"{name}.json", json.dumps(value, ensure_ascii=False))

    def delete(self) -> None:
        """Drop all parts, once the evaluation is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
