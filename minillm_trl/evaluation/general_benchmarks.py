"""Find and check tasks of EleutherAI's lm-eval for general benchmarks (GSM8K, MATH, BBH and others)."""

import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackageError, UserError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# The usual benchmarks for distilled models besides instruction following
SUITES = {"general": ("gsm8k", "minerva_math", "bbh", "ifeval", "mbpp", "sciq")}
_FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval, or a group of tasks whose documents are pooled.

    Attributes:
        name (`str`): name of the task or group.
        tasks (`dict[str, Task]`): lm-eval tasks by name.
    """

    name: str
    tasks: "dict[str, Task]"

    @property
    def is_group(self) -> bool:
        """Whether this is a group of tasks."""
        return list(self.tasks) != [self.name]


def find_benchmarks(
    names: Sequence[str], include_path: Path | None = None, run_unsafe_code: bool = False
) -> list[Benchmark]:
    """Load lm-eval tasks and their data.

    A group whose metrics lm-eval averages over its documents (`bbh`, `minerva_math`) is one benchmark. A group without
    metrics, an lm-eval tag or a suite expands to several benchmarks.

    Args:
        names (`Sequence[str]`): tasks, groups and tags of lm-eval, or keys of [`SUITES`].
        include_path (`Path`, *optional*): folder with your own task YAMLs, which override lm-eval's.
        run_unsafe_code (`bool`, *optional*, defaults to `False`): whether tasks may execute generated code.

    Raises:
        ValueError: if a name is unknown or duplicate, a task executes generated code without `run_unsafe_code`, or a
            task cannot be loaded.
        MissingPackageError: if lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError(
            "General benchmarks need lm-eval, which is not installed: pip install 'minillm-trl[eval]'"
        )
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: no such folder. Name a folder with task YAMLs.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = [task for name in names for task in SUITES.get(name, (name,))]
    for name in names:
        _check_known(name, manager, include_path)
    if unsafe := [task for name in names for task in _tasks_that_run_code(name, manager)]:
        _check_unsafe_code_allowed(unsafe[0], run_unsafe_code)
    benchmarks = [benchmark for name in names for benchmark in _load(name, manager)]
    loaded = [benchmark.name for benchmark in benchmarks]
    if twice := sorted({name for name in loaded if loaded.count(name) > 1}):
        raise UserError(f"--tasks names {twice[0]!r} twice. Remove one of them.")
    return benchmarks


def _check_known(name: str, manager: "TaskManager", include_path: Path | None) -> None:
    if name in manager.task_index:
        return
    near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    own = "" if include_path is None else f", nor a valid YAML in {include_path}"
    raise UserError(f"--tasks: {name!r} is not a task, group or tag of lm-eval{own}.{hint}")


def _tasks_that_run_code(name: str, manager: "TaskManager") -> list[str]:
    """Return the tasks under `name` that execute generated code, from their YAMLs.

    lm-eval itself checks only after loading the model, and its mbpp executes code while it loads.
    """
    entry = manager.task_index.get(name)
    if entry is None:  # defined inside a group
        return []
    config = entry.cfg or {}
    children = config["task"] if isinstance(config.get("task"), list) else []
    names = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in children]
    if name in manager.all_tags:
        names = sorted(entry.tags)
    own = [name] if config.get("unsafe_code") else []
    return own + [task for child in names for task in _tasks_that_run_code(child, manager)]


def _check_unsafe_code_allowed(name: str, run_unsafe_code: bool) -> None:
    if not run_unsafe_code:
        raise UserError(
            f"--tasks: {name} executes generated code on this machine, with your permissions. Run it in a sandbox, "
            "such as a container without network, and add --confirm_run_unsafe_code."
        )
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise UserError(
            f"--tasks: {name} executes generated code. Its metric also requires the environment variable "
            "HF_ALLOW_CODE_EVAL=1."
        )


def _load(name: str, manager: "TaskManager") -> list[Benchmark]:
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load([name])
    except (DatasetsError, ImportError, KeyError, OSError, ValueError) as error:
        raise UserError(f"--tasks: {name} cannot be loaded: {error}") from error
    group = loaded["groups"].get(name)
    if group is None:
        return [Benchmark(task_name, {task_name: task}) for task_name, task in loaded["tasks"].items()]
    return _benchmarks_of(group)


def _benchmarks_of(group: "Group") -> list[Benchmark]:
    from lm_eval.api.group import Group

    if group.has_aggregation:
        _check_pooled(group)
        return [Benchmark(group.name, {task.task_name: task for task in group.get_all_tasks()})]
    benchmarks = []
    for child in group:
        if isinstance(child, Group):
            benchmarks += _benchmarks_of(child)
        else:
            benchmarks.append(Benchmark(child.task_name, {child.task_name: child}))
    return benchmarks


def _check_pooled(group: "Group") -> None:
    tasks = group.get_all_tasks()
    instead = f"Name its tasks instead: {' '.join(task.task_name for task in tasks)}."
    by_size = all(metric.weight_by_size for metric in group.aggregate_metric_list)
    if not by_size and len({len(task.eval_docs) for task in tasks}) > 1:
        raise UserError(f"--tasks: {group.name} averages over tasks of different size, not over documents. {instead}")
    if not set.intersection(*(_mean_metrics(task) for task in tasks)):
        raise UserError(f"--tasks: no metric of {group.name} is a mean over documents in all its tasks. {instead}")


def _mean_metrics(task: "Task") -> set[str]:
    from lm_eval.api.metrics import mean

    return {name for name, aggregate in task.aggregation().items() if aggregate is mean}


def set_num_fewshot(task: "Task", num_fewshot: int | None) -> None:
    """Set the number of solved examples in a task's prompts.

    Args:
        task (`Task`): lm-eval task; changed in place.
        num_fewshot (`int`, *optional*): number of examples; by default the task's own.

    Raises:
        ValueError: if the task is defined without examples, which lm-eval does not change either, or has fewer than
            `num_fewshot`.
    """
    defined = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", defined or 0)
        return
    if defined == 0 and num_fewshot > 0:
        raise UserError(
            f"--num_fewshot {num_fewshot}: {task.task_name} is defined without examples. Evaluate it in a separate "
            "run without --num_fewshot."
        )
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    try:
        task.build_all_requests(limit=1)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"--num_fewshot {num_fewshot}: {task.task_name} has fewer examples ({error}). Lower it, or omit it to use "
            "the task's own number."
        ) from error


def max_new_tokens(task: "Task") -> int | None:
    """Return a task's limit on generated tokens; None if the task only scores given answers."""
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
    from lm_eval.models.utils import normalize_gen_kwargs

    if task.OUTPUT_TYPE != "generate_until":
        return None
    return normalize_gen_kwargs(task.get_config("generation_kwargs"), DEFAULT_MAX_GEN_TOKS)["max_gen_toks"]


def check_room(task: "Task", context: int) -> None:
    """Check, before a model is loaded, that the context leaves room for a prompt.

    Args:
        task (`Task`): lm-eval task.
        context (`int`): context length of the model, in tokens.

    Raises:
        ValueError: if there is no room. Prompts that fit only partly are counted during the evaluation, see
            [`evaluate_task`][minillm_trl.evaluation.lm_eval_results.evaluate_task].
    """
    length = max_new_tokens(task)
    if length is not None and length >= context:
        raise UserError(
            f"--tasks: {task.task_name} generates up to {length} tokens, which leaves no room for a prompt in a "
            f"context of {context} tokens. Remove it for this model."
        )


def task_settings(task: "Task", limit: int | None) -> dict[str, Any]:
    """Return everything besides the model that a task's results depend on.

    Args:
        task (`Task`): lm-eval task, after [`set_num_fewshot`].
        limit (`int`, *optional*): number of documents; all by default.
    """
    decoding = task.get_config("generation_kwargs") if task.OUTPUT_TYPE == "generate_until" else {}
    samples = bool(decoding.get("do_sample"))
    num_fewshot = task.get_config("num_fewshot")
    documents = [document for _, document in task.doc_iterator(limit=limit)]
    definition = {k: v for k, v in task.dump_config().items() if k not in ("metadata", "num_fewshot")}
    return {
        "kind": "lm_eval",
        "seeds": [],
        "greedy": not samples,
        "temperature": decoding.get("temperature") if samples else None,
        "max_new_tokens": max_new_tokens(task),
        "no_repeat_ngram_size": None,
        "prompts": len(documents),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "dataset": task.task_name,
        "split": task.get_config("test_split") or task.get_config("validation_split"),
        "task_version": task.VERSION,
        "definition_sha256": _digest([definition]),
        "data_sha256": _digest([*documents, *(task.fewshot_docs() if num_fewshot else ())]),
    }


def merge_settings(name: str, settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of a group: the common value of its tasks, or the list of their values if they differ."""
    merged = {}
    for key, value in settings[0].items():
        values = [task_values[key] for task_values in settings]
        merged[key] = value if all(other == value for other in values) else values
    return {
        **merged,
        "prompts": sum(task_values["prompts"] for task_values in settings),
        "dataset": name,
        "parts": [task_values["dataset"] for task_values in settings],
    }


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        # Functions in a definition by name: their repr contains an address, which differs between runs
        text = json.dumps(value, sort_keys=True, default=lambda item: getattr(item, "__qualname__", str(item)))
        digest.update(text.encode())
    return digest.hexdigest()
