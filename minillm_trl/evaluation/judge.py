"""LLM as a judge: the published prompt, requests about pairs of answers, and scores from the verdicts."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.templates import message_text, split_instruction
from ..errors import UserError
from .results import EvaluatedModel
from .statistics import MeanInterval, bootstrap_interval, bootstrap_ratio
from .verdicts import Verdict

REFERENCE = "reference"

# System message, markers and order are Vicuna's (FastChat, 2023). The request is the one that later papers quote for
# the GPT-4 feedback of MiniLLM (arXiv 2306.08543): Vicuna's with "user instruction and input" for "user question".
# We rename the first marker to match it.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPLATE = """\
[User Instruction and Input]
{question}

[The Start of Assistant 1's Answer]
{first}

[The End of Assistant 1's Answer]

[The Start of Assistant 2's Answer]
{second}

[The End of Assistant 2's Answer]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user instruction \
and input displayed above.
Please rate the helpfulness, relevance, accuracy, and level of detail of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias \
and ensuring that the order in which the responses were presented does not affect your judgment."""
PROMPT_SHA256 = hashlib.sha256(f"{SYSTEM}\0{TEMPLATE}".encode()).hexdigest()

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_SCORES = re.compile(r"(\d+(?:\.\d+)?)(?:\s+|\s*,\s*)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Pair:
    """Two answers to a question: a model's `answer`, and `other` from a reference or another model.

    `prompt` is the index of the prompt in its task.
    """

    prompt: int
    question: str
    answer: str
    other: str


@dataclass(frozen=True)
class Protocol:
    """How the judge is asked about pairs.

    Attributes:
        judge_model (`str`): model name at the endpoint.
        max_tokens (`int`): length limit of a reply.
        extra_body (`dict`): more fields of the request; `None` removes a field.
        swap (`bool`): whether to judge every pair in both orders. If not, the model's answer is first at even prompts
            and second at odd prompts, which balances the judge's position bias.
    """

    judge_model: str
    max_tokens: int
    extra_body: dict[str, Any]
    swap: bool = True

    def requests(self, pair: Pair) -> list["Request"]:
        """Return the requests about a pair, one per order."""
        orders = (True, False) if self.swap else (pair.prompt % 2 == 0,)
        return [self._request(pair, model_first) for model_first in orders]

    def _request(self, pair: Pair, model_first: bool) -> "Request":
        first, second = (pair.answer, pair.other) if model_first else (pair.other, pair.answer)
        text = TEMPLATE.format(question=pair.question, first=first, second=second)
        body = {
            "model": self.judge_model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **self.extra_body,
        }
        return Request({name: value for name, value in body.items() if value is not None}, model_first)


@dataclass(frozen=True)
class Request:
    """Body of a request about a pair, and whether the model's answer is first in it."""

    body: dict[str, Any]
    model_first: bool

    @property
    def key(self) -> str:
        """Digest of the body. Equal requests share a verdict."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()


def parse_scores(reply: str) -> tuple[float, float] | None:
    """Return the two scores in a reply's first line; None unless the line is exactly two numbers from 1 to 10.

    Leading blank lines and `<think>` blocks are skipped; asterisks and a comma in the line are ignored.
    """
    line = _THOUGHTS.sub("", reply).strip().partition("\n")[0].strip("* \t\r")
    match = _SCORES.fullmatch(line)
    if match is None:
        return None
    scores = (float(match[1]), float(match[2]))
    return scores if all(1 <= score <= 10 for score in scores) else None


def make_pairs(
    model: EvaluatedModel, opponent: EvaluatedModel | None, task: str, *, samples_per_prompt: int, max_rows: int | None
) -> list[Pair]:
    """Pair a model's answers with the first reference of their prompts, or with another model's answers.

    Args:
        model ([`EvaluatedModel`]): model whose answers are judged.
        opponent ([`EvaluatedModel`], *optional*): other model; `None` for the references.
        task (`str`): one of the model's tasks.
        samples_per_prompt (`int`): answers per prompt, from the first sampling seeds of each model.
        max_rows (`int`, *optional*): number of prompts, from the first; `None` for all.

    Raises:
        ValueError: if there are fewer answers or no references, or the other model answered different prompts.
    """
    samples = model.tasks[task].samples[:max_rows]
    others = samples if opponent is None else _answers_to_the_same(model, opponent, task, samples)
    pairs = []
    for number, (sample, other) in enumerate(zip(samples, others, strict=True)):
        place = f"{model.name}, {task}, prompt {number} (counting from 0)"
        if opponent is None and not sample["references"]:
            raise UserError(f"{place} has no reference. Name another run with --against.")
        available = min(len(sample["outputs"]), len(other["outputs"]))
        if available < samples_per_prompt:
            raise UserError(f"{place} has {available} answers. Lower --samples_per_prompt {samples_per_prompt}.")
        for index in range(samples_per_prompt):
            against = sample["references"][0] if opponent is None else other["outputs"][index]
            texts = (question_text(sample["prompt"]), sample["outputs"][index].strip(), against.strip())
            pairs.append(Pair(number, *texts))
    return pairs


def _answers_to_the_same(
    model: EvaluatedModel, opponent: EvaluatedModel, task: str, samples: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    if task not in opponent.tasks:
        raise UserError(
            f"{opponent.name} was not evaluated on {task}, but {model.name} was. Exclude the task with --tasks."
        )
    others = opponent.tasks[task].samples[: len(samples)]
    if [sample["prompt"] for sample in samples] != [other["prompt"] for other in others]:
        raise UserError(
            f"{model.name} and {opponent.name} were evaluated on different prompts of {task}. Evaluate both on the "
            "same prompts."
        )
    return others


def question_text(prompt: str | list[dict[str, str]]) -> str:
    """Return a prompt as shown to the judge: instruction and input without the training template.

    A single message is returned as it is; in longer conversations every message starts with its role.
    """
    if isinstance(prompt, str):
        return "\n\n".join(filter(None, split_instruction(prompt) or (prompt.strip(),)))
    if len(prompt) == 1:
        return message_text(prompt)
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Scores:
    """The judge's scores of a model on a task.

    Attributes:
        summary (`dict[str, MeanInterval]`): means over prompts with 95 % bootstrap intervals, where a prompt's value
            is the mean over its pairs: `ratio`, 100 * sum of the model's scores / sum of the opponent's scores; the
            mean scores `model` and `other`; `win`, `tie` and `loss` in percent of pairs; and, for pairs judged in both
            orders, `position`, the score of the first answer minus the score of the second. Empty without judged
            pairs.
        counts (`dict[str, int]`): number of `pairs`, of pairs `judged` in at least one order, of pairs judged in
            `one_order` only although both were requested, and of verdicts that are `unparsed` or `missing`.
        per_prompt (`list[dict[str, float] | None]`): means over the pairs of a prompt; `None` if no pair was judged.
    """

    summary: dict[str, MeanInterval]
    counts: dict[str, int]
    per_prompt: list[dict[str, float] | None]


def score_pairs(pairs: Iterable[Pair], protocol: Protocol, verdicts: Mapping[str, Verdict]) -> Scores:
    """Return the scores of one model on one task.

    A pair's scores are the means over the orders in which it was judged. Pairs without scores are left out.

    Args:
        pairs (`Iterable[Pair]`): all pairs of the model on the task.
        protocol ([`Protocol`]): protocol of the requests.
        verdicts (`Mapping[str, Verdict]`): verdicts by request key.
    """
    by_prompt: dict[int, list[dict[str, float]]] = {}
    counts = dict.fromkeys(("pairs", "judged", "one_order", "unparsed", "missing"), 0)
    for pair in pairs:
        scored = by_prompt.setdefault(pair.prompt, [])
        requests = protocol.requests(pair)
        pair_verdicts = [verdicts.get(request.key) for request in requests]
        parsed = [
            (request.model_first, verdict.scores)
            for request, verdict in zip(requests, pair_verdicts, strict=True)
            if verdict is not None and verdict.scores is not None
        ]
        counts["pairs"] += 1
        counts["judged"] += bool(parsed)
        counts["one_order"] += len(parsed) == 1 < len(requests)
        counts["missing"] += pair_verdicts.count(None)
        counts["unparsed"] += len(pair_verdicts) - pair_verdicts.count(None) - len(parsed)
        if parsed:
            scored.append(_pair_scores(parsed))
    per_prompt = [_means(scored) if scored else None for _, scored in sorted(by_prompt.items())]
    return Scores(_summary([means for means in per_prompt if means is not None]), counts, per_prompt)


def _pair_scores(verdicts: list[tuple[bool, tuple[float, float]]]) -> dict[str, float]:
    """Return the means over the judged orders of (whether the model's answer is first, scores of both answers)."""
    first, second = np.mean([scores for _, scores in verdicts], axis=0)
    ordered = [scores if model_first else scores[::-1] for model_first, scores in verdicts]
    model, other = map(float, np.mean(ordered, axis=0))
    values = {"model": model, "other": other, "win": 100.0 * (model > other)}
    values |= {"tie": 100.0 * (model == other), "loss": 100.0 * (model < other)}
    return values | ({"position": float(first - second)} if len(verdicts) == 2 else {})


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _summary(rows: list[dict[str, float]]) -> dict[str, MeanInterval]:
    if not rows:
        return {}
    columns = {name: [row[name] for row in rows if name in row] for name in (*rows[0], "position")}
    ratio = bootstrap_ratio(columns["model"], columns["other"])
    return {"ratio": ratio} | {name: bootstrap_interval(values) for name, values in columns.items() if values}
