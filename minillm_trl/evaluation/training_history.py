"""Read the evaluations logged during a training from its newest checkpoint."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..errors import UserError
from ..files.json_files import read_json
from ..training.checkpoints import newest_whole_checkpoint

# Metrics that evaluations during training log, see `docs/metrics.md`
EVALUATED = ("eval_rouge_l", "eval_objective/reverse_kl", "eval_completions/mean_length")

# Functional syntax: the keys, which are EVALUATED, are not identifiers
_Entry = TypedDict(
    "_Entry",
    {
        "step": int,
        "eval_rouge_l": NotRequired[float],
        "eval_objective/reverse_kl": NotRequired[float],
        "eval_completions/mean_length": NotRequired[float],
    },
)


class _State(TypedDict):
    log_history: list[_Entry]


def training_folder(settings: dict[str, Any]) -> Path | None:
    """Return the training folder of an evaluated model, or None if it is missing or has no checkpoint.

    Args:
        settings (`dict`): settings of the evaluation, whose model or adapter may be a training folder or a checkpoint
            in it.
    """
    folder = Path(settings["model"] if settings["adapter"] is None else settings["adapter"])
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent
    return folder if newest_whole_checkpoint(folder) is not None else None


def read_history(folder: Path) -> dict[str, dict[int, float]]:
    """Read the metrics that evaluations during a training logged.

    Args:
        folder (`Path`): `output_dir` of the training.

    Returns:
        `dict[str, dict[int, float]]`: value by step, for each metric of [`EVALUATED`] in the log.

    Raises:
        ValueError: if there is no checkpoint, or its state is invalid.
    """
    checkpoint = newest_whole_checkpoint(folder)
    if checkpoint is None:
        raise UserError(
            f"{folder}: no complete checkpoint with a trainer_state.json. Name the output_dir of a training."
        )
    path = Path(checkpoint) / "trainer_state.json"
    history: dict[str, dict[int, float]] = {}
    for entry in read_json(path, _State, "This is not a trainer state. Delete this checkpoint.")["log_history"]:
        for key in EVALUATED:
            if key in entry:
                history.setdefault(key, {})[entry["step"]] = float(entry[key])
    return history
