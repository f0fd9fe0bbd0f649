"""Make the generation config of a model one that can be saved, before anything is computed."""

import tempfile
from typing import Any

from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import UserError

logger = logging.get_logger(__name__)


def make_saveable(config: GenerationConfig, owner: str, announce: bool = True) -> None:
    """Check that transformers saves a generation config, and set `do_sample` where only this is missing.

    transformers loads a config with sampling options (`temperature`, `top_p`) but without `do_sample`, and refuses to
    save it: some releases always, others once an end or padding token was changed, as training does.

    Args:
        config ([`~transformers.GenerationConfig`]): changed in place: sampling options without `do_sample` become
            sampling options with `do_sample=True`.
        owner (`str`): the model, for messages.
        announce (`bool`, *optional*, defaults to `True`): whether to log the change.

    Raises:
        UserError: if it cannot be saved for another reason, or has `do_sample=False` next to sampling options.
    """
    if _problem(config) is None:
        return
    if config.do_sample is None:
        config.do_sample = True
        if _problem(config) is None:
            if announce:
                logger.warning(
                    f"The generation config of {owner} has sampling options without do_sample, which cannot be saved. "
                    "It is saved with do_sample=true."
                )
            return
        config.do_sample = None
    raise UserError(
        f"the generation config of {owner} cannot be saved, so its generation_config.json has to be fixed first. "
        f"{_problem(config)}"
    )


def _problem(config: GenerationConfig) -> str | None:
    """Return why transformers does not save a config; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError as error:
            return str(error)
    return None


class SaveableOnTrainBegin(TrainerCallback):
    """Call [`make_saveable`] on the student once transformers has given it the tokenizer's tokens."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Check the student's generation config before the first step."""
        make_saveable(found["model"].generation_config, "the student", announce=state.is_world_process_zero)
