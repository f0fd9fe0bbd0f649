"""What a training logged of its evaluations, read from its newest checkpoint."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..errors import UserError
from ..files.json_files import read_json
from ..training.checkpoints import newest_whole_checkpoint

# Logged by evaluations during training, see `docs/metrics.md`
EVALUATED = ("eval_rouge_l", "eval_objective/reverse_kl", "eval_completions/mean_length")

_Entry = TypedDict("_Entry", {"step": int, **dict.fromkeys(EVALUATED, NotRequired[float])})


class _State(TypedDict):
    log_history: list[_Entry]


def training_folder(settings: dict[str, Any]) -> Path | None:
    """The folder of the training whose model was evaluated, if it is here and has a checkpoint left.

    Args:
        settings (`dict`): of the evaluation; its model or adapter may be a folder, or a checkpoint inside of one.
    """
    folder = Path(settings["model"] if settings["adapter"] is None else settings["adapter"])
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent
    return folder if newest_whole_checkpoint(folder) is not None else None


def read_history(folder: Path) -> dict[str, dict[int, float]]:
    """Read what the evaluations of a training logged.

    Args:
        folder (`Path`): `output_dir` of the training.

    Returns:
        `dict[str, dict[int, float]]`: value by step, of the metrics in [`EVALUATED`] that were logged.

    Raises:
        ValueError: if there is no checkpoint, or its state cannot be read.
    """
    checkpoint = newest_whole_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: no whole checkpoint with a trainer_state.json. Name the output_dir of a training.")
    path = Path(checkpoint) / "trainer_state.json"
    history: dict[str, dict[int, float]] = {}
    for entry in read_json(path, _State, "This is not a trainer's state. Delete this checkpoint.")["log_history"]:
        for key in EVALUATED:
            if key in entry:
                history.setdefault(key, {})[entry["step"]] = float(entry[key])
    return history
