"""Completions that the dataset gives in place of sampled ones: GKD's share of fixed texts (`lmbda`)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.encoding import encode_after_prompt
from ..models.init_kwargs import parsed_kwargs
from ..rollouts.keyed_random import GIVEN, keyed_uniforms

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer


def given_completions(trainer: "TeacherMixedTrainer", rows: Sequence[Mapping[str, Any]]) -> list[list[int] | None]:
    """Return the dataset's completion of each row that trains on it; nothing if all rows are sampled."""
    lmbda, seed = trainer.args.lmbda, trainer.args.seed
    if not trainer.model.training or lmbda == 1.0:
        return []
    step, first = trainer.state.global_step, trainer.accelerator.process_index * len(rows)
    keys = [(seed, GIVEN, step, first + row) for row in range(len(rows))]
    return choose_given(rows, lmbda, keys, trainer._tokenizer, parsed_kwargs(trainer.chat_template_kwargs))


def choose_given(
    rows: Sequence[Mapping[str, Any]],
    lmbda: float,
    keys: Sequence[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int] | None]:
    """Choose the rows that train on the dataset's completion, each with probability 1 - lmbda (GKD, Algorithm 1).

    GKD tosses its coin for a batch; here each row has one, which gives the same share with less noise.

    Args:
        rows (`Sequence[Mapping]`): rows of the dataset, with `prompt` and `completion`.
        lmbda (`float`): share of sampled rows, in [0, 1].
        keys (`Sequence[tuple[int, ...]]`): key of each row's coin.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        chat_template_kwargs (`dict`, *optional*): for conversations.

    Returns:
        `list[list[int] | None]`: token ids of each chosen completion, its end included; None for rows to sample.

    Raises:
        ValueError: for a chosen row without a completion.
    """
    chosen: list[list[int] | None] = []
    for row, key in zip(rows, keys, strict=True):
        if keyed_uniforms(1, *key)[0] < lmbda:
            chosen.append(None)
            continue
        if not row.get("completion"):
            raise UserError(
                f"lmbda={lmbda} trains on the dataset's completions, but the row with the prompt "
                f"{str(row['prompt'])[:80]!r} has none. Add a column `completion`, or set lmbda=1.0."
            )
        start, ids = encode_after_prompt(
            tokenizer, row["prompt"], row["completion"], chat_template_kwargs, source="train_dataset"
        )
        chosen.append(ids[start:])
    return chosen
