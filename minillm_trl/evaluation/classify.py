"""Evaluate a model as a zero-shot classifier: accuracy and calibration of its label words."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .calibration import calibration
from .evaluate import Evaluation, summarize_prompts
from .label_words import label_probabilities
from .task_measures import gather_rows, own_rows


def find_labels(dataset: Dataset, label_words: Sequence[str]) -> list[int]:
    """Return the index of each prompt's label word, which is its only reference.

    Raises:
        ValueError: if a prompt does not have exactly one reference, or the reference is not a label word.
    """
    if "references" not in dataset.column_names:
        raise UserError("Classification needs references: give every prompt one of the label words as its completion.")
    words = [word.strip() for word in label_words]
    labels = []
    for prompt, references in zip(dataset["prompt"], dataset["references"], strict=True):
        completions = {reference.strip() for reference in references}
        if len(completions) != 1 or not completions <= set(words):
            raise UserError(
                f"Prompt {prompt!r} has the completions {sorted(completions)}. Give it one of the label words {words}."
            )
        labels.append(words.index(completions.pop()))
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
    """Predict the most probable label word for each prompt (see [`label_probabilities`]).

    Processes share the prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        dataset ([`~datasets.Dataset`]): with columns `prompt` and `references`, which is the right label word.
        label_words (`Sequence[str]`): the words, each with a leading space if the prompts end without one.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.
        chat_template_kwargs (`dict`, *optional*): more arguments for the chat template.

    Returns:
        [`Evaluation`] with the measures `accuracy` (in [0, 100]) and `confidence` (probability of the predicted
        word, in [0, 1]), and `calibration` with the expected calibration error.

    Raises:
        ValueError: see [`find_labels`] and [`label_probabilities`].
    """
    labels = find_labels(dataset, label_words)
    rows = own_rows(len(dataset))
    probabilities: list[list[float]] = []
    if len(rows):
        prompts = dataset.select(rows)["prompt"][:]
        options: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
        probabilities = label_probabilities(model, tokenizer, prompts, label_words, **options).tolist()
    probabilities = gather_rows(probabilities, len(dataset))
    predicted = [max(range(len(label_words)), key=by_word.__getitem__) for by_word in probabilities]
    confidences = [by_word[index] for by_word, index in zip(probabilities, predicted, strict=True)]
    correct = [index == label for index, label in zip(predicted, labels, strict=True)]
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
            "probabilities": dict(zip(words, by_word, strict=True)),
        }
        for prompt, references, index, scores, by_word in zip(
            dataset["prompt"], dataset["references"], predicted, per_prompt, probabilities, strict=True
        )
    ]
    settings = {"prompts": len(dataset)}
    return Evaluation(summarize_prompts(per_prompt), per_prompt, samples, settings, {}, calibration=result)
