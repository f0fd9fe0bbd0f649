"""Evaluate a model as a zero-shot classifier: accuracy and calibration of its label words."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .calibration import calibration
from .evaluate import Evaluation, gather_rows, own_rows, summarize_prompts
from .label_words import label_probabilities


def find_labels(dataset: Dataset, label_words: Sequence[str]) -> list[int]:
    """Index of each prompt's label word, from its one reference.

    Raises:
        ValueError: if a prompt has no reference, several, or one that is none of the label words; with its text.
    """
    if "references" not in dataset.column_names:
        raise UserError("Classification needs a completion for each prompt: one of the label words.")
    words = [word.strip() for word in label_words]
    labels = []
    for prompt, references in zip(dataset["prompt"], dataset["references"], strict=True):
        found = {reference.strip() for reference in references}
        if len(found) != 1 or not found <= set(words):
            raise UserError(
                f"Prompt {prompt!r} has the completions {sorted(found)}. Give it one of the label words {words}."
            )
        labels.append(words.index(found.pop()))
    return labels


def classify_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    label_words: Sequence[str],
    batch_size: int = 64,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Evaluation:
    """Take the most probable label word of each prompt (see [`label_probabilities`]).

    Several processes, if there are, share the prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        dataset ([`~datasets.Dataset`]): with columns `prompt` and `references`, which holds the right label word.
        label_words (`Sequence[str]`): the words, with the space before them where the prompts end without one.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.
        chat_template_kwargs (`dict`, *optional*): what else the chat template is given.

    Returns:
        [`Evaluation`] with the measures `accuracy` (in [0, 100]) and `confidence` (probability of the word that was
        taken, in [0, 1]), and `calibration` with the expected calibration error.

    Raises:
        ValueError: see [`find_labels`] and [`label_probabilities`].
    """
    labels = find_labels(dataset, label_words)
    rows = own_rows(len(dataset))
    mine = []
    if len(rows):
        prompts = dataset.select(rows)["prompt"][:]
        options = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
        mine = label_probabilities(model, tokenizer, prompts, label_words, **options).tolist()
    probabilities = gather_rows(mine, len(dataset))
    taken = [max(range(len(label_words)), key=each.__getitem__) for each in probabilities]
    confidences = [each[index] for each, index in zip(probabilities, taken, strict=True)]
    correct = [index == label for index, label in zip(taken, labels, strict=True)]
    result = calibration(confidences, correct)
    per_prompt = [
        {"accuracy": 100.0 * right, "confidence": confidence}
        for right, confidence in zip(correct, confidences, strict=True)
    ]
    words = [word.strip() for word in label_words]
    samples = [
        {
            "prompt": prompt,
            "references": references,
            "outputs": [words[index]],
            "scores": {name: [value] for name, value in scores.items()},
            "probabilities": dict(zip(words, each, strict=True)),
        }
        for prompt, references, index, scores, each in zip(
            dataset["prompt"], dataset["references"], taken, per_prompt, probabilities, strict=True
        )
    ]
    settings = {"prompts": len(dataset)}
    return Evaluation(summarize_prompts(per_prompt), per_prompt, samples, settings, {}, calibration=result)
