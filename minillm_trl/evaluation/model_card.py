"""The model card of a trained student: its evaluation, teacher, recipe and citation, as a README.md for the hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..training.model_card import PAPER
from .comparison_tables import COLUMNS
from .report import format_cell
from .results import EvaluatedModel, TaskResult

MARK = "<!-- made by minillm-trl push -->"
_MEASURES = (
    "rouge_l",
    "exact_match",
    "accuracy",
    "reverse_kl",
    "forward_kl",
    "entropy_per_token",
    "length",
    "eos_rate",
)
# of the machine and its network
_PRIVATE = ("output_dir", "teacher_server_url", "offline_teacher", "teachers", "env")
_METHODS = {
    "minillm": "distilled with MiniLLM",
    "kd": "trained with word-level KD",
    "seqkd": "fine-tuned on its teacher's answers (SeqKD)",
    "sft": "fine-tuned",
}


def build_card(
    name: str,
    evaluation: EvaluatedModel | None,
    subcommand: str | None,
    attempt: Mapping[str, Any],
    recipe: str | None,
    is_adapter: bool,
) -> ModelCard:
    """Build the card.

    Local paths appear by their last part only.

    Args:
        name (`str`): name of the repository, `OWNER/NAME`.
        evaluation ([`~results.EvaluatedModel`], *optional*): results of `minillm-trl evaluate`.
        subcommand (`str`, *optional*): the subcommand that trained the model.
        attempt (`Mapping`): the last attempt in `run.json`; empty if there is none.
        recipe (`str`, *optional*): contents of `run.yaml`.
        is_adapter (`bool`): whether the folder holds a PEFT adapter and no whole model.
    """
    models = {
        role: shown_name(found["name"], is_local=found.get("fingerprint") is not None)
        for role, found in attempt.get("models", {}).items()
    }
    # the source of a mixture names several
    data = {
        role: [shown_name(source) for source in found["source"].split(" + ")]
        for role, found in attempt.get("data", {}).items()
    }
    tags = ["minillm", "distillation", "trl"] if subcommand == "minillm" else ["distillation", "trl"]
    facts = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=[model for role, model in models.items() if not role.startswith("teacher") and "/" in model]
        or None,
        datasets=sorted({source for sources in data.values() for source in sources if "/" in source}) or None,
        model_name=name.split("/")[-1],
        eval_results=[] if evaluation is None else list(_eval_results(evaluation)),
    )
    sections = [
        f"# {name.split('/')[-1]}",
        MARK,
        _introduction(subcommand, models, data),
        *([] if evaluation is None else ["## Evaluation", _table(evaluation)]),
        "## Use",
        _usage(name, is_adapter),
        *([] if recipe is None else ["## Training", _training(subcommand, attempt, recipe)]),
        "## Citation",
        f"```bibtex\n{PAPER['citation']}\n```",
    ]
    return ModelCard(f"---\n{facts.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def shown_name(name: str, is_local: bool = False) -> str:
    """Return a name on the hub as it is, and of a path its last part; `is_local` if it is known to be a path."""
    looks_like_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
    return name if looks_like_hub and not is_local and not Path(name).exists() else Path(name).name


def _introduction(subcommand: str | None, models: Mapping[str, str], data: Mapping[str, list[str]]) -> str:
    text = f"This model was {_METHODS.get(subcommand or '', 'trained')} with [minillm_trl](https://pypi.org/project/minillm-trl)."
    if "teacher" in models:
        text += f" Its teacher is `{models['teacher']}`."
    several = {role.removeprefix("teacher "): name for role, name in models.items() if role.startswith("teacher ")}
    if several:
        text += " Its teachers are " + " and ".join(f"`{name}` ({rows})" for rows, name in several.items()) + "."
    if "student" in models:
        text += f" Training started from `{models['student']}`."
    if "train" in data:
        text += " The data is " + " and ".join(f"`{source}`" for source in data["train"]) + "."
    return text


def _rows(evaluation: EvaluatedModel) -> Sequence[tuple[str, str, TaskResult]]:
    """Return task, decoding and result of each row of the table."""
    rows = []
    for task, result in evaluation.tasks.items():
        decodings = evaluation.decodings.get(task)
        if decodings is None:
            greedy = result.settings["greedy"] is True
            rows.append((task, "greedy" if greedy else f"temperature {result.settings['temperature']}", result))
        else:
            rows += [(task, str(decoding), found) for decoding, found in decodings.test.items()]
    return rows


def _table(evaluation: EvaluatedModel) -> str:
    rows = _rows(evaluation)
    measures = [measure for measure in _MEASURES if any(measure in result.summary for _, _, result in rows)]
    heads = [COLUMNS[measure].heading for measure in measures]
    lines = ["| " + " | ".join(["task", "decoding", "prompts", *heads]) + " |"]
    lines.append("|---|---|" + "---:|" * (1 + len(measures)))
    for task, decoding, result in rows:
        cells = [task, decoding, str(result.settings["prompts"])]
        for measure in measures:
            found = result.summary.get(measure)
            cells.append("–" if found is None else format_cell(found, COLUMNS[measure].digits))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("\nMeans over prompts with 95 % intervals, measured by `minillm-trl evaluate`.")
    if any(result.settings.get("teacher") for _, _, result in rows):
        lines.append("Divergences are from the teacher.")
    return "\n".join(lines)


def _eval_results(evaluation: EvaluatedModel) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task}, {decoding}",
            metric_type=measure,
            metric_value=round(result.summary[measure].mean, COLUMNS[measure].digits),
        )
        for task, decoding, result in _rows(evaluation)
        for measure in ("rouge_l", "exact_match", "accuracy")
        if measure in result.summary
    ]


def _usage(name: str, is_adapter: bool) -> str:
    if is_adapter:
        load = (
            f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{name}")'
        )
    else:
        load = f'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model="{name}")'
    return f"```python\n{load}\n```"


def _training(subcommand: str | None, attempt: Mapping[str, Any], recipe: str) -> str:
    values = yaml.safe_load(recipe)
    shown = {key: _without_path(value) for key, value in values.items() if value is not None and key not in _PRIVATE}
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    versions = attempt.get("versions", {})
    listed = ", ".join(
        f"{package} {versions[package]}" for package in ("minillm-trl", "trl", "torch") if package in versions
    )
    sentence = f"{attempt['steps']} optimizer steps" if attempt.get("steps") else "Trained"
    sentence += f" with {listed}." if listed else "."
    return (
        f"{sentence} `minillm-trl {subcommand} --config FILE.yaml` repeats the run:\n\n"
        f"<details><summary>Recipe</summary>\n\n```yaml\n{text}```\n\n</details>"
    )


def _without_path(value: Any) -> Any:
    """Return a value with the last parts of the paths in it."""
    if isinstance(value, Mapping):
        return {key: _without_path(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_path(item) for item in value]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))
    return Path(value).name if is_path else value
