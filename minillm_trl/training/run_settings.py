"""The settings of a run, which each checkpoint stores, and their changes when the run is resumed."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from ..files.json_files import read_json
from ..files.redaction import redact
from ..models.fingerprints import dataset_fingerprint, model_fingerprint, weights_fingerprint
from ..teacher_server.remote_teacher import ServedTeacher

SETTINGS = "run_settings.json"

# Output, logging, saving and evaluation, which do not change the training
_WITHOUT_EFFECT = re.compile(
    r"output_dir|run_name|project|trackio_.*|report_to|disable_tqdm|debug|local_rank|do_.*|log_.*|logging_.*|save_.*|"
    r"eval_.*|per_device_eval_batch_size|num_generations_eval|predict_with_generate|prediction_loss_only|"
    r"include_for_metrics|batch_eval_metrics|load_best_model_at_end|hub_.*|push_to_hub.*|resume_from_checkpoint|"
    r"restore_callback_states_from_checkpoint|ignore_data_skip|dataloader_(?!drop_last).*|dataset_num_proc|"
    r"num_completions_to_print|skip_memory_metrics|ddp_.*|max_nonfinite_steps|allow_pickled_weights|"
    r"teacher_server_(?!top_k|tokens).*|teachers|trust_remote_code|use_cpu|torch_empty_cache_steps|rollout_device"
)
# Taken from the optimizer's parameter groups instead, which also hold for an optimizer that the user created
_OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")

_DIGEST = "digest"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # an object's address differs between processes


def plain(value: Any) -> Any:
    """Convert a value to types that JSON and YAML can hold."""
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _ADDRESS.sub("", str(value))


def describe_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that change the training, without secrets and the optimizer's hyperparameters."""
    names = [entry.name for entry in fields(args)]
    kept = [name for name in names if not _WITHOUT_EFFECT.fullmatch(name) and name not in _OF_THE_OPTIMIZER]
    return redact({name: plain(getattr(args, name)) for name in kept})


def describe_dataset(dataset: Any) -> dict[str, Any] | None:
    """Return rows, columns and a digest of a dataset (see [`dataset_fingerprint`]); the digest of a stream is None."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: describe_dataset(part) for name, part in dataset.items()}
    if isinstance(dataset, Dataset):
        words = f"{len(dataset)} rows of {', '.join(dataset.column_names)}"
        return {"is": words, _DIGEST: dataset_fingerprint(dataset)}
    columns = (dataset.column_names or []) if isinstance(dataset, IterableDataset) else []
    return {"is": f"{type(dataset).__name__} of {', '.join(columns)}", _DIGEST: None}


def describe_model(model: str | torch.nn.Module | ServedTeacher) -> dict[str, Any]:
    """Return name and digest of a model, which is given as a name, a folder or a module, or is on servers."""
    if isinstance(model, ServedTeacher):
        return model.describe()
    if isinstance(model, str):
        return {"is": model, _DIGEST: model_fingerprint(Path(model))}
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return {"is": name, _DIGEST: weights_fingerprint(model)}


def describe_teachers(
    teachers: "str | torch.nn.Module | ServedTeacher | Mapping[str, Any]",
) -> dict[str, Any]:
    """Return what [`describe_model`] returns for the teacher or, by name, for several ones."""
    if isinstance(teachers, Mapping):
        return {name: describe_model(teacher) for name, teacher in teachers.items()}
    return describe_model(teachers)


def teacher_digest(described: Mapping[str, Any]) -> str:
    """Return the digest or the name of the teacher, or those of several ones, from [`describe_teachers`]."""
    if _is_described(described):
        return described[_DIGEST] or described["is"]
    return ", ".join(f"{name}: {teacher_digest(teacher)}" for name, teacher in described.items())


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `field: old -> new` for each field of nested settings that has changed.

    Fields that only one side has are left out, since another version of the package may have written the other side.
    Models by name, such as several teachers, are compared as a whole: one more or one less is a change.
    """
    changes = []
    for name in then.keys() & now.keys():
        old, new = then[name], now[name]
        if _is_described(old) and _is_described(new):
            by = _DIGEST if None not in (old[_DIGEST], new[_DIGEST]) else "is"
            if old[by] != new[by]:
                changes.append(f"{name}: {_words(old)} -> {_words(new)}")
        elif (_are_models(old) or _are_models(new)) and _names(old) != _names(new):
            changes.append(f"{name}: {_words(old)} -> {_words(new)}")
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += [f"{name}.{change}" for change in find_changes(old, new)]
        elif old != new:
            changes.append(f"{name}: {_words(old)} -> {_words(new)}")
    return sorted(changes)


def read_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Read the settings of a checkpoint's run; None if another program wrote the checkpoint."""
    path = checkpoint / SETTINGS
    return read_json(path, dict[str, Any], "Resume from an earlier checkpoint.") if path.is_file() else None


def write_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its checkpoint."""
    (checkpoint / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _is_described(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"is", _DIGEST}


def _are_models(value: Any) -> bool:
    """Return whether the value describes several models by name."""
    return isinstance(value, Mapping) and bool(value) and all(map(_is_described, value.values()))


def _names(value: Any) -> set[str]:
    return set(value) if _are_models(value) else set()


def _words(value: Any) -> str:
    if _are_models(value):
        return ", ".join(f"{name}: {_words(model)}" for name, model in value.items())
    if not _is_described(value):
        return json.dumps(value) if isinstance(value, Mapping) else str(value)
    return value["is"] if value[_DIGEST] is None else f"{value['is']} ({value[_DIGEST][:8]})"
