"""General benchmarks (GSM8K, MATH, BBH and others): finds the tasks of EleutherAI's lm-eval and checks them."""

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

# Beside instruction following, what distilled models are mostly measured on
SUITES = {"general": ("gsm8k", "minerva_math", "bbh", "ifeval", "mbpp", "sciq")}
_FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval, or a group of tasks whose documents count together.

    Attributes:
        name (`str`): of the task or group.
        tasks (`dict[str, Task]`): lm-eval's, by name.
    """

    name: str
    tasks: "dict[str, Task]"

    @property
    def is_group(self) -> bool:
        """Whether this is a group and not a task of its own."""
        return list(self.tasks) != [self.name]


def find_benchmarks(
    names: Sequence[str], include_path: Path | None = None, run_unsafe_code: bool = False
) -> list[Benchmark]:
    """Load tasks and their data.

    A group whose metrics lm-eval averages over its documents (`bbh`, `minerva_math`) is one benchmark. A group without
    metrics of its own, a tag of lm-eval and a suite stand for several.

    Args:
        names (`Sequence[str]`): of tasks, groups and tags of lm-eval, and of [`SUITES`].
        include_path (`Path`, *optional*): folder with task YAMLs of one's own, which come before lm-eval's.
        run_unsafe_code (`bool`, *optional*, defaults to `False`): whether tasks may run what the model writes.

    Raises:
        ValueError: if lm-eval is not installed, a name is not known or stands twice, a task runs code without leave
            for it, or a task cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError(
            "General benchmarks need lm-eval, which is not installed: pip install 'minillm-trl[eval]'"
        )
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: there is no such folder.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = [each for name in names for each in SUITES.get(name, (name,))]
    for name in names:
        _check_known(name, manager, include_path)
    if programs := [each for name in names for each in _tasks_that_run_code(name, manager)]:
        _check_leave(programs[0], run_unsafe_code)
    benchmarks = [benchmark for name in names for benchmark in _load(name, manager)]
    found = [benchmark.name for benchmark in benchmarks]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise UserError(f"--tasks names {twice[0]!r} twice. Leave one of them out.")
    return benchmarks


def _check_known(name: str, manager: "TaskManager", include_path: Path | None) -> None:
    if name in manager.task_index:
        return
    near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    own = "" if include_path is None else f", nor a valid YAML in {include_path}"
    raise UserError(f"--tasks: {name!r} is no task, group or tag of lm-eval{own}.{hint}")


def _tasks_that_run_code(name: str, manager: "TaskManager") -> list[str]:
    """Found in the YAMLs: lm-eval says it only once the model is there, and its mbpp runs code when it is loaded."""
    entry = manager.task_index.get(name)
    if entry is None:  # defined inside of a group
        return []
    config = entry.cfg or {}
    children = config["task"] if isinstance(config.get("task"), list) else []
    names = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in children]
    if name in manager.all_tags:
        names = sorted(entry.tags)
    found = [name] if config.get("unsafe_code") else []
    return found + [each for child in names for each in _tasks_that_run_code(child, manager)]


def _check_leave(name: str, run_unsafe_code: bool) -> None:
    if not run_unsafe_code:
        raise UserError(
            f"--tasks: {name} runs code that the model writes, on this machine and as this user. Start it where that "
            "does no harm, such as in a container without network, and add --confirm_run_unsafe_code."
        )
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise UserError(
            f"--tasks: {name} runs code that the model writes. Beside --confirm_run_unsafe_code, the metric asks for "
            "the environment variable HF_ALLOW_CODE_EVAL=1."
        )


def _load(name: str, manager: "TaskManager") -> list[Benchmark]:
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load([name])
    except (DatasetsError, ImportError, KeyError, OSError, ValueError) as error:
        raise UserError(f"--tasks: {name} cannot be loaded: {error}") from error
    group = loaded["groups"].get(name)
    if group is None:
        return [Benchmark(each, {each: task}) for each, task in loaded["tasks"].items()]
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
    instead = f"Name its tasks one by one: {' '.join(task.task_name for task in tasks)}."
    by_size = all(each.weight_by_size for each in group.aggregate_metric_list)
    if not by_size and len({len(task.eval_docs) for task in tasks}) > 1:
        raise UserError(f"--tasks: {group.name} is the mean of tasks of different size, not of documents. {instead}")
    if not set.intersection(*(_mean_metrics(task) for task in tasks)):
        raise UserError(f"--tasks: no metric of {group.name} is a mean over the documents of all its tasks. {instead}")


def _mean_metrics(task: "Task") -> set[str]:
    from lm_eval.api.metrics import mean

    return {name for name, aggregate in task.aggregation().items() if aggregate is mean}


def set_num_fewshot(task: "Task", num_fewshot: int | None) -> None:
    """Set the number of solved examples in a task's prompts.

    Args:
        task (`Task`): of lm-eval; changed in place.
        num_fewshot (`int`, *optional*): the number; by default the one in the task's definition.

    Raises:
        ValueError: if the task is defined without examples, which lm-eval would not change either, or has fewer.
    """
    defined = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", defined or 0)
        return
    if defined == 0 and num_fewshot > 0:
        raise UserError(
            f"--num_fewshot {num_fewshot}: {task.task_name} is defined without examples. Evaluate it in a run of its "
            "own, without --num_fewshot."
        )
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    try:
        task.build_all_requests(limit=1)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"--num_fewshot {num_fewshot}: {task.task_name} has not as many examples ({error}). Lower it, or leave it "
            "out for the task's own number."
        ) from error


def max_new_tokens(task: "Task") -> int | None:
    """Length limit of what a task lets the model write; None if it compares given answers."""
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
    from lm_eval.models.utils import normalize_gen_kwargs

    if task.OUTPUT_TYPE != "generate_until":
        return None
    return normalize_gen_kwargs(task.get_config("generation_kwargs"), DEFAULT_MAX_GEN_TOKS)["max_gen_toks"]


def check_room(task: "Task", context: int) -> None:
    """Check that there is room for a prompt, before a model is loaded.

    Args:
        task (`Task`): of lm-eval.
        context (`int`): longest context of the model, in tokens.

    Raises:
        ValueError: if there is none. Prompts that fit only in part are counted later, see
            [`evaluate_task`][minillm_trl.evaluation.lm_eval_results.evaluate_task].
    """
    length = max_new_tokens(task)
    if length is not None and length >= context:
        raise UserError(
            f"--tasks: {task.task_name} lets the model write {length} tokens, which leaves no room for a prompt in a "
            f"context of {context} tokens. Leave it out for this model."
        )


def task_settings(task: "Task", limit: int | None) -> dict[str, Any]:
    """What the results of a task depend on, beside the model.

    Args:
        task (`Task`): of lm-eval, with its number of examples set.
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
    """The settings of a group from those of its tasks: one value where all have the same, else a list of theirs."""
    merged = {}
    for key, value in settings[0].items():
        values = [each[key] for each in settings]
        merged[key] = value if all(each == value for each in values) else values
    return {
        **merged,
        "prompts": sum(each["prompts"] for each in settings),
        "dataset": name,
        "parts": [each["dataset"] for each in settings],
    }


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        # functions inside of a definition by name: their addresses differ from run to run
        text = json.dumps(value, sort_keys=True, default=lambda each: getattr(each, "__qualname__", str(each)))
        digest.update(text.encode())
    return digest.hexdigest()
