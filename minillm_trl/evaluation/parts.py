"""Store finished parts of an evaluation on disk, so that an interrupted one resumes."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..files.json_files import check_unchanged, read_json
from ..files.whole_files import make_folder, write_whole


class Parts:
    """Finished parts of an evaluation, one JSON file each. A restarted run reads them instead of recomputing.

    Args:
        folder (`Path`): folder of the parts, created with the first part.
        settings (`dict`): everything that the parts depend on, as JSON values.

    Raises:
        ValueError: if the folder has parts computed with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        stored = self.get("settings")
        if stored is not None:
            remedy = "Delete this folder, or name another with --output_dir."
            check_unchanged(stored, self.settings, f"{folder} holds an unfinished evaluation", remedy)

    def get(self, name: str) -> Any:
        """Return a stored part, or None."""
        path = self.folder / f"{name}.json"
        remedy = "Delete this file to recompute the part."
        return read_json(path, dict[str, Any] if name == "settings" else Any, remedy) if path.is_file() else None

    def put(self, name: str, value: Any) -> None:
        """Store a part atomically."""
        make_folder(self.folder)
        if name != "settings" and not (self.folder / "settings.json").is_file():
            self.put("settings", self.settings)
        write_whole(self.folder / f"{name}.json", json.dumps(value, ensure_ascii=False))

    def delete(self) -> None:
        """Delete all parts, once the evaluation is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
