"""An LLM as judge: the published prompt, what of it is asked about a pair of answers, and scores of the verdicts."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.templates import message_text, split_instruction
from ..errors import UserError
from .metrics import MeanInterval, bootstrap_interval, bootstrap_ratio
from .results import EvaluatedModel
from .verdicts import Verdict

REFERENCE = "reference"

# System message, markers and order are those of Vicuna's evaluation (FastChat, 2023), but for the name of the first
# marker. The request is the one that later papers quote for the GPT-4 feedback of MiniLLM (arXiv 2306.08543), which is
# Vicuna's with "user instruction and input" for "user question"; that name follows it.
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
    """Two answers to a question: `answer` of a model, and `other` of a reference or of another model.

    `prompt` is the number of the prompt in its task, from 0.
    """

    prompt: int
    question: str
    answer: str
    other: str


@dataclass(frozen=True)
class Protocol:
    """How pairs are put to the judge.

    Attributes:
        judge_model (`str`): its name at the endpoint.
        max_tokens (`int`): limit of a reply.
        extra_body (`dict`): fields of the request beside these; `None` leaves out one of them.
        swap (`bool`): whether each pair is judged in both orders. If not, models stand first at even prompts and
            second at odd ones.
    """

    judge_model: str
    max_tokens: int
    extra_body: dict[str, Any]
    swap: bool = True

    def requests(self, pair: Pair) -> list["Request"]:
        """What is asked about a pair."""
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
    """Body of a request about a pair, and whether the model's answer stands first in it."""

    body: dict[str, Any]
    model_first: bool

    @property
    def key(self) -> str:
        """Digest of the body: equal requests have one verdict."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()


def parse_scores(reply: str) -> tuple[float, float] | None:
    """The two scores of a reply's first line, or None if it does not hold two numbers from 1 to 10 and nothing else.

    Blank lines, `<think>` blocks before it, and asterisks or a comma in it do not matter.
    """
    line = _THOUGHTS.sub("", reply).strip().partition("\n")[0].strip("* \t\r")
    found = _SCORES.fullmatch(line)
    scores = (float(found[1]), float(found[2])) if found else ()
    return scores if scores and all(1 <= score <= 10 for score in scores) else None


def make_pairs(
    model: EvaluatedModel, opponent: EvaluatedModel | None, task: str, *, samples_per_prompt: int, max_rows: int | None
) -> list[Pair]:
    """Pairs of a model's answers with the first reference of their prompts, or with another model's answers.

    Args:
        model ([`EvaluatedModel`]): whose answers are judged.
        opponent ([`EvaluatedModel`], *optional*): the other model; `None` for the references.
        task (`str`): one of the model's tasks.
        samples_per_prompt (`int`): answers to each prompt, those of the first sampling seeds. The other model's are of
            the same places in its own.
        max_rows (`int`, *optional*): the first prompts only.

    Raises:
        ValueError: if there are fewer answers, no references, or the other model answered other prompts.
    """
    samples = model.tasks[task].samples[:max_rows]
    others = samples if opponent is None else _answers_to_the_same(model, opponent, task, samples)
    pairs = []
    for number, (sample, other) in enumerate(zip(samples, others, strict=True)):
        place = f"{model.name}, {task}, prompt {number} (counting from 0)"
        if opponent is None and not sample["references"]:
            raise UserError(f"{place} has no reference. Judge against another run with --against.")
        fewest = min(len(sample["outputs"]), len(other["outputs"]))
        if fewest < samples_per_prompt:
            raise UserError(f"{place} has {fewest} answers. Lower --samples_per_prompt {samples_per_prompt}.")
        for index in range(samples_per_prompt):
            against = sample["references"][0] if opponent is None else other["outputs"][index]
            texts = (question_text(sample["prompt"]), sample["outputs"][index].strip(), against.strip())
            pairs.append(Pair(number, *texts))
    return pairs


def _answers_to_the_same(
    model: EvaluatedModel, opponent: EvaluatedModel, task: str, samples: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    if task not in opponent.tasks:
        raise UserError(f"{opponent.name} was not evaluated on {task}, {model.name} was. Leave it out with --tasks.")
    others = opponent.tasks[task].samples[: len(samples)]
    if [each["prompt"] for each in samples] != [each["prompt"] for each in others]:
        raise UserError(f"{model.name} and {opponent.name} were evaluated on different prompts of {task}.")
    return others


def question_text(prompt: str | list[dict[str, str]]) -> str:
    """Instruction and input as the judge reads them, without the wrapper that models are trained with.

    A conversation of one message is that message; longer ones have the role before each message.
    """
    if isinstance(prompt, str):
        return "\n\n".join(filter(None, split_instruction(prompt) or (prompt.strip(),)))
    if len(prompt) == 1:
        return message_text(prompt)
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Scores:
    """What the judge said of a model on a task.

    Attributes:
        summary (`dict[str, MeanInterval]`): with 95 % bootstrap intervals over prompts, each prompt counting with the
            mean over its pairs: `ratio`, 100 * sum of the model's scores / sum of the others'; the mean scores `model`
            and `other`; `win`, `tie` and `loss` in percent of pairs; and, of the pairs judged in both orders,
            `position`, the score of the answer that stands first minus that of the second. Empty if none was judged.
        counts (`dict[str, int]`): `pairs`, `judged` in one order or more, `one_order` of those that were to be judged
            in two, and the verdicts that are `unparsed` and `missing`.
        per_prompt (`list[dict[str, float] | None]`): the means over each prompt's pairs, `None` if none was judged.
    """

    summary: dict[str, MeanInterval]
    counts: dict[str, int]
    per_prompt: list[dict[str, float] | None]


def score_pairs(pairs: Iterable[Pair], protocol: Protocol, verdicts: Mapping[str, Verdict]) -> Scores:
    """Scores of one model on one task.

    The scores of a pair are the means over the orders in which it was judged; one without scores is left out.

    Args:
        pairs (`Iterable[Pair]`): all of the model on the task.
        protocol ([`Protocol`]): by which they were judged.
        verdicts (`Mapping[str, Verdict]`): by the requests' keys.
    """
    by_prompt: dict[int, list[dict[str, float]]] = {}
    counts = dict.fromkeys(("pairs", "judged", "one_order", "unparsed", "missing"), 0)
    for pair in pairs:
        scored = by_prompt.setdefault(pair.prompt, [])
        requests = protocol.requests(pair)
        found = [verdicts.get(request.key) for request in requests]
        parsed = [
            (request.model_first, verdict.scores)
            for request, verdict in zip(requests, found, strict=True)
            if verdict is not None and verdict.scores is not None
        ]
        counts["pairs"] += 1
        counts["judged"] += bool(parsed)
        counts["one_order"] += len(parsed) == 1 < len(requests)
        counts["missing"] += found.count(None)
        counts["unparsed"] += len(found) - found.count(None) - len(parsed)
        if parsed:
            scored.append(_pair_scores(parsed))
    per_prompt = [_means(scored) if scored else None for _, scored in sorted(by_prompt.items())]
    return Scores(_summary([each for each in per_prompt if each is not None]), counts, per_prompt)


def _pair_scores(verdicts: list[tuple[bool, tuple[float, float]]]) -> dict[str, float]:
    """From the scores of the first and second answer in each order, with whether the first is the model's."""
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
