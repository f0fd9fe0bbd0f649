"""vLLM on a CPU: when its tests run, a tiny vocabulary, and weights that can be updated."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import build_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# `make test-vllm` sets it to the file of the numbers that the tests measure, and the settings of vLLM with it
RESULTS = "MINILLM_VLLM_RESULTS"
WORDS = ["<eos>", "<pad>", "a", "b", "c", "d", "e", "f"]
needs_vllm = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(RESULTS not in os.environ, reason="needs an environment with vLLM: make test-vllm"),
]


def record(name: str, numbers: dict[str, object]) -> None:
    """Add numbers to the file of results."""
    path = Path(os.environ[RESULTS])
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, name: numbers}))


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of eight tokens."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def build_word_model(seed: int) -> PreTrainedModel:
    """Build a model of the eight tokens; vLLM's attention on CPUs needs heads of at least 32 dimensions."""
    return build_model("llama", len(WORDS), seed, width=64)


def save_student(folder: Path) -> str:
    """Save a student of the eight tokens, from which vLLM starts."""
    build_word_model(0).save_pretrained(folder)
    build_word_tokenizer().save_pretrained(folder)
    return str(folder)


def law(model: PreTrainedModel, prompt: list[int], horizon: int, ends: set[int]) -> dict[tuple[int, ...], float]:
    """Return the probability of every completion of at most `horizon` tokens, by enumeration."""
    return mixture_law(model, model, prompt, horizon, ends, 0.0)


@torch.no_grad()
def mixture_law(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt: list[int],
    horizon: int,
    ends: set[int],
    alpha: float,
    temperature: float = 1.0,
) -> dict[tuple[int, ...], float]:
    """Return the probability of every completion under the mixture of each token, by enumeration."""
    open_, closed = {(): 1.0}, {}
    for _ in range(horizon):
        rows = torch.tensor([[*prompt, *prefix] for prefix in open_])
        of_student, of_teacher = (
            torch.softmax(model(rows).logits[:, -1].double() / temperature, dim=-1) for model in (student, teacher)
        )
        next_ = alpha * of_teacher + (1 - alpha) * of_student
        grown = {
            (*prefix, token): probability * float(row[token])
            for (prefix, probability), row in zip(open_.items(), next_, strict=True)
            for token in range(len(WORDS))
        }
        closed |= {prefix: probability for prefix, probability in grown.items() if prefix[-1] in ends}
        open_ = {prefix: probability for prefix, probability in grown.items() if prefix[-1] not in ends}
    return closed | open_


def surprise(samples: list[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]) -> float:
    """Return how far the samples are from a law: chi-square of the counts, in standard deviations from its mean.

    Completions that are expected less than five times count as one.
    """
    counts = dict.fromkeys(probabilities, 0)
    for sample in samples:
        counts[sample] += 1
    expected = {name: len(samples) * probability for name, probability in probabilities.items()}
    rare = [name for name in expected if expected[name] < 5]
    cells = [(counts[name], expected[name]) for name in expected if expected[name] >= 5]
    if rare:
        cells.append((sum(counts[name] for name in rare), sum(expected[name] for name in rare)))
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    return (chi_square - freedom) / (2 * freedom) ** 0.5
