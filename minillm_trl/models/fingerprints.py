"""Digests of models and datasets, with which a resumed run checks that they are still the same."""

import hashlib
import json
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from datasets import Dataset

from ..files.json_files import read_json

# The files that determine a model's answers; a run's folder also holds other files
_MODEL_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*"),
)
_BLOCK, _BLOCKS = 4096, 1024  # bytes per block, blocks per file
_NUMBERS = 8  # values read from each parameter
_ROWS = 256  # rows read from a dataset


class _AdapterConfig(TypedDict):
    base_model_name_or_path: NotRequired[str | None]


def model_fingerprint(folder: Path) -> str | None:
    """Return a digest of a local model, equal for copies of it; None for a hub name, whose revision identifies it.

    The digest covers names, sizes and contents of weights, configurations and tokenizer, and the base of an adapter.
    A file of more than 4 MiB is sampled at 1024 evenly spaced blocks of 4 KiB. This is fast for a model of any size,
    and enough, as training changes numbers in every matrix.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    if (adapter := folder / "adapter_config.json").is_file():
        base = read_json(adapter, _AdapterConfig, "Copy or save the adapter again.").get("base_model_name_or_path")
        digest.update(str(base and model_fingerprint(Path(base))).encode())
    return digest.hexdigest()


@torch.no_grad()
def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return a digest of a model in memory: name, shape and first eight values of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:_NUMBERS].double().tolist()
        digest.update(f"{name}:{tuple(parameter.shape)}:{first}".encode())
    return digest.hexdigest()


def dataset_fingerprint(dataset: Dataset) -> str:
    """Return a digest of a dataset: its number of rows and 256 evenly spaced rows."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    plain = dataset.with_format(None)
    for index in range(0, len(dataset), max(1, len(dataset) // _ROWS)):
        digest.update(json.dumps(plain[index], sort_keys=True, default=str).encode())
    return digest.hexdigest()
