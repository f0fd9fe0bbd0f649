"""Text measures of completions: overlap with references, repetition and diversity, as pure functions."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported in the functions: rouge_score and BLEU load all of nltk, which is slow
    from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # Stemming takes longer than the comparison, and a reference is compared with every sample of its prompt
    tokenizer = DefaultTokenizer(use_stemmer=True)
    tokenizer.tokenize = lru_cache(maxsize=2**15)(tokenizer.tokenize)
    return RougeScorer(["rougeL"], tokenizer=tokenizer)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the Rouge-L of a prediction against its best-matching reference, in [0, 100].

    F-measure of the longest common subsequence of stemmed words (package `rouge-score`), texts stripped, maximum over
    references, as in the original code's `rouge_metric.py`.

    Args:
        prediction (`str`): generated text; an empty text scores 0.
        references (`Sequence[str]`): at least one reference text.

    Raises:
        ValueError: if there is no reference, or `references` is one text instead of a list.
    """
    _check_references("rouge_l", references)
    prediction = prediction.strip()
    return 100 * max(_scorer().score(reference.strip(), prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 100 if a prediction equals one of the references, else 0.

    Leading and trailing white space is ignored. Case and punctuation count.

    Args:
        prediction (`str`): generated text.
        references (`Sequence[str]`): at least one reference text.

    Raises:
        ValueError: if there is no reference, or `references` is one text instead of a list.
    """
    _check_references("exact_match", references)
    return 100.0 if prediction.strip() in {reference.strip() for reference in references} else 0.0


def _check_references(measure: str, references: Sequence[str]) -> None:
    if not references:
        raise ValueError(f"{measure} needs at least one reference.")
    if isinstance(references, str):
        raise ValueError(f"{measure} needs a list of references, got the text {references!r}: write [reference].")


def repeated_ngrams(token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that repeat an earlier one in the sequence: 1 - distinct / total, in [0, 1).

    Args:
        token_ids (`Sequence[int]`): one completion.
        n (`int`, *optional*, defaults to `4`): length of the n-grams. Sequences shorter than n score 0.

    Raises:
        ValueError: if n is less than 1.
    """
    if n < 1:
        raise ValueError(f"repeated_ngrams needs n >= 1, got {n}.")
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    return 1 - len({tuple(token_ids[i : i + n]) for i in range(total)}) / total


def distinct_ngrams(texts: Sequence[str], n: int = 4) -> float:
    """Return Dist-n, the number of distinct word n-grams in all texts over the number of n-grams, in [0, 1].

    Over the samples for one prompt it measures their diversity; over a corpus, the diversity of the corpus.

    Args:
        texts (`Sequence[str]`): split into words at white space.
        n (`int`, *optional*, defaults to `4`): length of the n-grams. Texts without n-grams score 0.

    Raises:
        ValueError: if n is less than 1.
    """
    if n < 1:
        raise ValueError(f"distinct_ngrams needs n >= 1, got {n}.")
    texts_words = [text.split() for text in texts]
    ngrams = [tuple(words[i : i + n]) for words in texts_words for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_outputs(outputs: Sequence[str]) -> float:
    """Return the share of distinct texts among n samples for one prompt: 1 if all differ, 1/n if all are equal.

    Raises:
        ValueError: if `outputs` is empty.
    """
    if not outputs:
        raise ValueError("distinct_outputs needs at least one output.")
    return len({output.strip() for output in outputs}) / len(outputs)


def self_bleu(outputs: Sequence[str]) -> float:
    """Return the Self-BLEU of several samples for one prompt: mean BLEU-4 of a sample against the others, in [0, 100].

    100 if all samples are equal, 0 if no two share a word. Sentence BLEU of package `nltk` on words split at white
    space, with case and punctuation unchanged. As in Texygen, which introduced the measure, an n-gram order without a
    match counts as 0.1 matches (`SmoothingFunction().method1`). An output with fewer than 4 words uses the orders up
    to its length, so that equal short outputs reach 100. An output without words scores 100 if another output is empty
    too, else 0.

    Args:
        outputs (`Sequence[str]`): at least two samples.

    Raises:
        ValueError: if there are fewer than two outputs.
    """
    if len(outputs) < 2:
        raise ValueError(f"self_bleu needs at least two outputs, got {len(outputs)}. Sample with more seeds.")
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words = [output.split() for output in outputs]
    smoothing = SmoothingFunction().method1
    total = 0.0
    for i, hypothesis in enumerate(words):
        others = words[:i] + words[i + 1 :]
        if hypothesis:
            total += sentence_bleu(others, hypothesis, smoothing_function=smoothing, auto_reweigh=True)
        else:
            total += float([] in others)
    return 100 * total / len(words)
