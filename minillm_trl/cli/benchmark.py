"""`minillm-trl benchmark`: measure a model on general benchmarks with lm-eval."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UserError
from ..evaluation.general_benchmarks import (
    SUITES,
    Benchmark,
    check_room,
    find_benchmarks,
    merge_settings,
    set_num_fewshot,
    task_settings,
)
from ..evaluation.lm_eval_results import TaskOutcome, evaluate_task, pool, wrap_model
from ..evaluation.report import format_cell
from ..evaluation.statistics import MeanInterval
from ..models.end_tokens import carry, find_end_tokens
from .arguments import PlainParser, parse_with_config
from .option_values import json_object
from .task_results import is_done, weight_files, write_results

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "benchmark",
        description="Measure a model on general benchmarks, which EleutherAI's lm-eval runs "
        "(pip install 'minillm-trl[eval]'), with 95 % bootstrap intervals over documents. Tasks with results in "
        "output_dir are skipped.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with values for any of these options")
    parser.add_argument("--model", required=True, help="name or folder of a model, or of a PEFT adapter alone")
    parser.add_argument("--adapter", help="name or folder of a PEFT adapter for the model")
    suites = "; ".join(f"{name} stands for {', '.join(tasks)}" for name, tasks in SUITES.items())
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"tasks, groups and tags of lm-eval; {suites}; each has a folder of its name in output_dir",
    )
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="folder with your own task YAMLs")
    parser.add_argument(
        "--num_fewshot", type=int, metavar="N", help="solved examples in the prompt (default: the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N documents of each task only")
    parser.add_argument("--batch_size", default="8", help="requests run together, or auto (default: 8)")
    parser.add_argument("--apply_chat_template", action="store_true", help="wrap prompts in the chat template")
    parser.add_argument(
        "--chat_template_kwargs", type=json_object, metavar="JSON", help="further arguments of the chat template"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tasks' folders")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="dtype of the model (default: auto, as saved; trained models are often saved in float32)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    parser.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="allow tasks such as mbpp to run the code that the model writes",
    )
    return parser


@dataclass(frozen=True)
class _Job:
    """A benchmark to run: the folders of a group's tasks (empty for a single task), and the tasks without results."""

    folder: Path
    settings: dict[str, Any]
    parts: list[Path]
    to_do: "list[tuple[Path, Task, dict[str, Any]]]"


def run(argv: list[str]) -> int:
    """Parse the arguments, evaluate task by task, and write `results.json` and `samples.jsonl` of each."""
    arguments, launch = parse_with_config(build_parser(), argv)
    if launch:
        raise UserError(f"benchmark runs in one process: drop {next(iter(launch))}.")
    _check(arguments)
    benchmarks = find_benchmarks(arguments.tasks, arguments.include_path, arguments.confirm_run_unsafe_code)
    for benchmark in benchmarks:
        for task in benchmark.tasks.values():
            set_num_fewshot(task, arguments.num_fewshot)
    jobs = list(_jobs(arguments, benchmarks))
    lm = _load(arguments, jobs) if any(job.to_do for job in jobs) else None
    for job in jobs:
        for folder, task, settings in job.to_do:
            outcome = evaluate_task(
                lm,
                task,
                limit=arguments.limit,
                apply_chat_template=arguments.apply_chat_template,
                run_unsafe_code=arguments.confirm_run_unsafe_code,
            )
            _save(folder, settings, outcome, lm)
        if job.parts:
            _save_pooled(job)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be positive, got {arguments.limit}.")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise UserError(f"--num_fewshot must not be negative, got {arguments.num_fewshot}.")
    if arguments.chat_template_kwargs is not None and not arguments.apply_chat_template:
        raise UserError("--chat_template_kwargs has no effect without --apply_chat_template. Add it.")
    size = arguments.batch_size
    if size != "auto" and not (size.isdecimal() and int(size) > 0):
        raise UserError(f"--batch_size must be a positive number or auto, got {size!r}.")


def _jobs(arguments: argparse.Namespace, benchmarks: list[Benchmark]) -> Iterator[_Job]:
    """Yield the benchmarks without results; raise if results of other settings are in the way."""
    files = weight_files((arguments.model, arguments.adapter))
    for benchmark in benchmarks:
        folder = arguments.output_dir / benchmark.name
        folders = {name: folder / name if benchmark.is_group else folder for name in benchmark.tasks}
        settings = {name: _settings(arguments, task) for name, task in benchmark.tasks.items()}
        whole = settings.get(benchmark.name) or merge_settings(benchmark.name, list(settings.values()))
        if is_done(folder, whole, files):
            continue
        to_do = [
            (folders[name], task, settings[name])
            for name, task in benchmark.tasks.items()
            if not (benchmark.is_group and is_done(folders[name], settings[name], files))
        ]
        yield _Job(folder, whole, list(folders.values()) if benchmark.is_group else [], to_do)


def _settings(arguments: argparse.Namespace, task: "Task") -> dict[str, Any]:
    return {
        **task_settings(task, arguments.limit),
        "model": arguments.model,
        "adapter": arguments.adapter,
        "teacher": None,
        "dtype": arguments.dtype,
        "apply_chat_template": arguments.apply_chat_template,
        "chat_template_kwargs": arguments.chat_template_kwargs,
        "exposure_bias_samples": 0,
        "label_words": None,
    }


def _load(arguments: argparse.Namespace, jobs: list[_Job]) -> "HFLM":
    from lm_eval.models.utils import resolve_max_length

    from ..models.loading import load_config, load_model, load_tokenizer

    trust = arguments.trust_remote_code
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=trust, adapter=arguments.adapter)
    if arguments.apply_chat_template and tokenizer.chat_template is None:
        raise UserError(f"--apply_chat_template: the tokenizer of {arguments.model} has no chat template. Drop it.")
    context = resolve_max_length(load_config(arguments.model, trust), tokenizer)
    for job in jobs:
        for _, task, _ in job.to_do:
            check_room(task, context)
    model = load_model(arguments.model, arguments.adapter, arguments.dtype, trust, arguments.allow_pickled_weights)
    if (
        arguments.apply_chat_template
    ):  # answers end with their turn, even if the saved generation config says otherwise
        template = arguments.chat_template_kwargs
        declared = model.generation_config
        carry(find_end_tokens(tokenizer, conversational=True, student=declared, chat_template_kwargs=template), model)
    size = arguments.batch_size if arguments.batch_size == "auto" else int(arguments.batch_size)
    return wrap_model(model, tokenizer, size, arguments.chat_template_kwargs)


def _save(folder: Path, settings: dict[str, Any], outcome: TaskOutcome, lm: "HFLM") -> None:
    main_measure = {"main_measure": outcome.main_measure, "higher_is_better": outcome.higher_is_better}
    results = {
        **_results({**settings, **main_measure}, settings["task_version"], outcome.summary),
        "corpus": outcome.corpus,
        "intervals": outcome.intervals,
        "truncated_prompts": outcome.truncated_prompts,
        "generation_config": lm.model.generation_config.to_diff_dict(),
        "per_prompt": outcome.per_prompt,
    }
    write_results(folder, results, outcome.samples)
    _print(folder, results)


def _save_pooled(job: _Job) -> None:
    parts = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in job.parts]
    pooled = pool(parts)
    better = parts[0]["settings"]["higher_is_better"]
    main_measure = {"main_measure": next(iter(pooled["summary"])), "higher_is_better": better}
    versions = {part["settings"]["dataset"]: part["versions"]["task"] for part in parts}
    results = {
        **_results({**job.settings, **main_measure}, versions, pooled.pop("summary")),
        "generation_config": parts[0]["generation_config"],
        **pooled,
    }
    texts = [(folder / "samples.jsonl").read_text(encoding="utf-8").removesuffix("\n") for folder in job.parts]
    # not splitlines, which also splits at separators inside texts
    write_results(job.folder, results, [json.loads(line) for text in texts for line in text.split("\n")])
    _print(job.folder, results)


def _results(settings: dict[str, Any], task_version: Any, summary: dict[str, MeanInterval]) -> dict[str, Any]:
    """Return the fields that every `results.json` has, empty where they concern sampled texts only."""
    versions = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
    return {
        "settings": settings,
        "versions": {"minillm-trl": __version__, **versions, "task": task_version},
        "summary": {name: interval._asdict() for name, interval in summary.items()},
        "by_seed": {},
        "corpus": {},
        "buckets": [],
        "exposure_bias": None,
        "calibration": None,
    }


def _print(folder: Path, results: dict[str, Any]) -> None:
    for name, interval in results["summary"].items():
        print(f"{name:<30} {format_cell(MeanInterval(**interval), 3)}")
    for name, value in results["corpus"].items():
        print(f"{name:<30} {value:.3f}, without an interval")
    prompts = results["settings"]["prompts"]
    if count := results["truncated_prompts"]:
        print(f"{count} of {prompts} prompts were longer than the model's context, so it read only their ends")
    print(f"{prompts} documents; written to {folder}")
