"""Store finished parts of an evaluation on disk, so that an interrupted one resumes."""

import shutil
from pathlib import Path
from typing import Any

from ..files.result_folder import ResultFolder


class Parts(ResultFolder):
    """Finished parts of an evaluation. The folder is deleted once the evaluation is finished.

    Args:
        folder (`Path`): folder of the parts, created with the first part.
        settings (`dict`): everything that the parts depend on, as JSON values.

    Raises:
        ValueError: if the folder has parts computed with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        remedy = "Delete this folder, or name another with --output_dir."
        super().__init__(folder, settings, "an unfinished evaluation", remedy)

    def delete(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)
