"""`minillm-trl judge`: let an LLM score answers against the references, or against another model's answers."""

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..evaluation.chat_client import ChatClient, check_base_url, check_installed
from ..evaluation.judge import PROMPT_SHA256, REFERENCE, Pair, Protocol, Scores, make_pairs, parse_scores, score_pairs
from ..evaluation.report import Column, Row, Table, format_table
from ..evaluation.results import read_evaluation
from ..evaluation.verdicts import Verdict, collect_verdicts, read_verdicts
from ..files.messages import shortened
from ..files.whole_files import write_whole
from .arguments import PlainParser, parse_plain
from .compare import named_folder

Place = tuple[str, str]  # task and model

_KEY = "OPENAI_API_KEY"
_CHARACTERS_PER_TOKEN = 4


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "judge",
        description="Let an LLM score the answers that `minillm-trl evaluate` wrote from 1 to 10, each together with "
        "the reference, as the paper's GPT-4 feedback does: 100 * sum of the model's scores / sum of the references'. "
        "Verdicts are kept in output_dir and never requested twice.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that `evaluate` wrote, or NAME=FOLDER to name its row"
    )
    parser.add_argument(
        "--against", default=REFERENCE, metavar="RUN", help="run to judge against (default: reference, the references)"
    )
    parser.add_argument("--base_url", required=True, help="OpenAI-compatible endpoint, as http://localhost:8000/v1")
    parser.add_argument("--judge_model", required=True, metavar="NAME", help="model of the endpoint that judges")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for verdicts.jsonl and judge.json")
    parser.add_argument("--api_key_env", metavar="NAME", help=f"environment variable of the API key (default: {_KEY})")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="judge these tasks only")
    parser.add_argument("--max_rows", type=int, help="judge the first prompts of each task only")
    parser.add_argument(
        "--samples_per_prompt", type=int, default=1, help="answers judged, of the first sampling seeds (default: 1)"
    )
    parser.add_argument(
        "--no_swap", action="store_true", help="judge each pair in one order instead of both, at half the cost"
    )
    parser.add_argument("--max_tokens", type=int, default=512, help="length limit of a reply (default: 512)")
    parser.add_argument(
        "--extra_body",
        type=_extra_body,
        default={},
        metavar="JSON",
        help="further fields of the requests; null leaves one out, as in "
        '\'{"max_tokens": null, "max_completion_tokens": 2000}\'',
    )
    parser.add_argument("--concurrency", type=int, default=8, help="concurrent requests (default: 8)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer (default: 120)")
    parser.add_argument("--max_retries", type=int, default=6, help="retries of a failed request (default: 6)")
    parser.add_argument("--tokenizer", help="name or folder of a tokenizer, for the estimate of tokens")
    parser.add_argument(
        "--price_per_million", type=float, nargs=2, metavar=("INPUT", "OUTPUT"), help="price per million tokens"
    )
    parser.add_argument("--max_requests", type=int, help="send nothing if more requests are needed")
    parser.add_argument("--dry_run", action="store_true", help="print the estimate and exit")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, estimate the cost, request missing verdicts, and write and print the scores."""
    arguments = parse_plain(build_parser(), argv)
    _check(arguments)
    pairs = _pairs(arguments)
    protocol = Protocol(arguments.judge_model, arguments.max_tokens, arguments.extra_body, not arguments.no_swap)
    requests = {
        request.key: request.body for place in pairs.values() for pair in place for request in protocol.requests(pair)
    }
    path = arguments.output_dir / "verdicts.jsonl"
    found = read_verdicts(path)
    missing = [body for key, body in requests.items() if key not in found]
    print(f"{len(missing)} requests to {arguments.judge_model}; {len(requests) - len(missing)} were answered before.")
    if missing:
        print(_estimate(missing, arguments.tokenizer, arguments.price_per_million))
    if arguments.max_requests is not None and len(missing) > arguments.max_requests:
        raise UserError(f"--max_requests {arguments.max_requests}: {len(missing)} are needed. Nothing was asked.")
    if arguments.dry_run:
        return 0
    with ChatClient(
        arguments.base_url,
        _api_key(arguments.api_key_env),
        key_name=arguments.api_key_env or _KEY,
        timeout=arguments.timeout,
        max_retries=arguments.max_retries,
    ) as client:
        verdicts, refused = collect_verdicts(requests, path, client, parse_scores, concurrency=arguments.concurrency)
    scores = {place: score_pairs(judged, protocol, verdicts) for place, judged in pairs.items()}
    _check_judged(scores, verdicts, refused)
    _save(arguments, scores, verdicts)
    _show(arguments, scores, refused)
    return 0


def _extra_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(body, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    if taken := sorted(body.keys() & {"model", "messages", "stream", "n"}):
        raise argparse.ArgumentTypeError(f"must not hold {taken[0]!r}")
    return body


def _check(arguments: argparse.Namespace) -> None:
    check_base_url(arguments.base_url)
    if not arguments.dry_run:
        check_installed()
    for name in ("samples_per_prompt", "max_tokens", "concurrency", "timeout", "max_rows"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value}.")
    for name in ("max_retries", "max_requests"):
        value = getattr(arguments, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} must not be negative, got {value}.")
    if min(arguments.price_per_million or [0]) < 0:
        raise UserError(f"--price_per_million must not be negative, got {min(arguments.price_per_million)}.")


def _api_key(name: str | None) -> str | None:
    """Return the API key; None if the default variable is not set, since local servers need no key.

    A message never shows the given name, which may be the key by mistake.
    """
    key = os.environ.get(name or _KEY, "").strip()
    if name is not None and not key:
        raise UserError(
            "--api_key_env: no environment variable of this name is set. It takes the name of a variable that holds "
            "the key, and not the key."
        )
    return key or None


def _pairs(arguments: argparse.Namespace) -> dict[Place, list[Pair]]:
    """Return the pairs to judge for each task and model."""
    models = [read_evaluation(*named_folder(word)) for word in arguments.runs]
    opponent = None if arguments.against == REFERENCE else read_evaluation(*named_folder(arguments.against))
    names = [model.name for model in (*models, opponent) if model is not None]
    if len(set(names)) < len(names):
        raise UserError(f"Cannot judge {names}: each run needs its own name, as in NAME=FOLDER.")
    known = list(dict.fromkeys(task for model in models for task in model.tasks))
    if unknown := sorted(set(arguments.tasks or ()) - set(known)):
        raise UserError(f"--tasks {unknown[0]}: there are only {', '.join(known)}.")
    pairs = {}
    for task in arguments.tasks or known:
        for model in (model for model in models if task in model.tasks):
            if not any(sample.get("outputs") for sample in model.tasks[task].samples):
                print(f"{model.name}, {task}: skipped, as it has no text answers.")
                continue
            pairs[task, model.name] = make_pairs(
                model, opponent, task, samples_per_prompt=arguments.samples_per_prompt, max_rows=arguments.max_rows
            )
        _check_same_questions(task, {model: its for (name, model), its in pairs.items() if name == task})
    if not pairs:
        raise UserError("There is nothing to judge.")
    return pairs


def _check_same_questions(task: str, pairs: dict[str, list[Pair]]) -> None:
    for (one, its), (other, others) in pairwise(pairs.items()):
        if [(pair.question, pair.other) for pair in its] != [(pair.question, pair.other) for pair in others]:
            raise UserError(f"{one} and {other} were evaluated on different prompts or references of {task}.")


def _estimate(bodies: list[dict[str, Any]], tokenizer_name: str | None, prices: list[float] | None) -> str:
    texts = [message["content"] for body in bodies for message in body["messages"]]
    if tokenizer_name is None:
        prompt_tokens, how = sum(map(len, texts)) // _CHARACTERS_PER_TOKEN, f"characters / {_CHARACTERS_PER_TOKEN}"
    else:
        from ..models.loading import load_tokenizer  # torch takes seconds, and without a tokenizer nothing needs it

        tokenizer = load_tokenizer(tokenizer_name)
        prompt_tokens, how = sum(map(len, tokenizer(texts)["input_ids"])), f"tokenizer of {tokenizer_name}"
    limits: list[int] = []
    for body in bodies:
        if (limit := body.get("max_completion_tokens", body.get("max_tokens"))) is None:
            raise UserError("--extra_body leaves out max_tokens. Set max_completion_tokens instead.")
        limits.append(limit)
    text = f"Estimate: {prompt_tokens:,} input tokens ({how}) and at most {sum(limits):,} output tokens"
    if prices is not None:
        text += f", at most {(prompt_tokens * prices[0] + sum(limits) * prices[1]) / 1e6:,.2f} at the given prices"
    return f"{text}; repeated requests for unusable replies come on top."


def _check_judged(scores: dict[Place, Scores], verdicts: dict[str, Verdict], refused: dict[str, str]) -> None:
    if any(found.summary for found in scores.values()):
        return
    if refused:
        raise UserError(f"No pair was judged. {next(iter(refused.values()))}")
    reply = shortened(next(iter(verdicts.values())).reply)
    raise UserError(
        f"No reply has two scores from 1 to 10 in its first line; one is {reply}. Choose a judge that follows the "
        "prompt, or raise --max_tokens if it thinks first."
    )


def _save(arguments: argparse.Namespace, scores: dict[Place, Scores], verdicts: dict[str, Verdict]) -> None:
    tasks: dict[str, dict[str, Any]] = {}
    for (task, model), found in scores.items():
        summary = {name: interval._asdict() for name, interval in found.summary.items()}
        tasks.setdefault(task, {})[model] = {**found.counts, "summary": summary, "per_prompt": found.per_prompt}
    used = verdicts.values()
    results = {
        "settings": {
            "judge_model": arguments.judge_model,
            "answered_as": sorted({verdict.model for verdict in used if verdict.model is not None}),
            "base_url": arguments.base_url,
            "prompt_sha256": PROMPT_SHA256,
            "runs": arguments.runs,
            "against": arguments.against,
            "both_orders": not arguments.no_swap,
            "samples_per_prompt": arguments.samples_per_prompt,
            "max_rows": arguments.max_rows,
            "temperature": arguments.extra_body.get("temperature", 0),
            "max_tokens": arguments.max_tokens,
            "extra_body": arguments.extra_body,
        },
        "versions": {"minillm-trl": __version__},
        "verdicts": len(used),
        "unparsed": sum(verdict.scores is None for verdict in used),
        "asked_again": sum(verdict.asked - 1 for verdict in used),
        "retries": sum(verdict.retries for verdict in used),
        "prompt_tokens": sum(verdict.prompt_tokens for verdict in used),
        "completion_tokens": sum(verdict.completion_tokens for verdict in used),
        "tasks": tasks,
    }
    write_whole(arguments.output_dir / "judge.json", json.dumps(results, indent=1))


def _show(arguments: argparse.Namespace, scores: dict[Place, Scores], refused: dict[str, str]) -> None:
    other = REFERENCE if arguments.against == REFERENCE else named_folder(arguments.against)[0]
    columns = [
        Column("ratio", f"Score in % of {other}", "higher"),
        Column("model", "Score", "higher", 2),
        Column("other", f"Score of {other}", "lower", 2),
        Column("win", "Wins (%)", "higher"),
        Column("tie", "Ties (%)", "higher"),
        Column("loss", "Losses (%)", "lower"),
        Column("position", "First minus second", "lower", 2),
    ]
    for task in dict.fromkeys(task for task, _ in scores):
        rows = [Row(model, dict(found.summary)) for (name, model), found in scores.items() if name == task]
        print(f"\n{task}, judged by {arguments.judge_model}\n{format_table(Table(columns, rows))}")
    all_scores = list(scores.values())
    counts = {name: sum(found.counts[name] for found in all_scores) for name in all_scores[0].counts}
    print(f"\n{counts['judged']} of {counts['pairs']} pairs judged", end="")
    print(", each in one order." if arguments.no_swap else f", {counts['one_order']} of them in one order only.")
    if counts["unparsed"]:
        print(f"{counts['unparsed']} verdicts are left out, as no reply to them could be parsed.")
    if refused:
        print(f"{counts['missing']} verdicts are missing. {next(iter(refused.values()))}")
    print(f"Written to {arguments.output_dir / 'judge.json'}")
