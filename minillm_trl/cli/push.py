"""`minillm-trl push`: write the model card of a trained model, and upload both to the hub."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import UserError
from ..files.json_files import read_json
from ..files.whole_files import write_whole
from .arguments import PlainParser, parse_plain

if TYPE_CHECKING:
    from ..evaluation.results import EvaluatedModel

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
# A list of what belongs to a model, since a run's folder may hold anything: logs, answers, paths of the machine
UPLOADED = (
    *WEIGHTS,
    *("*.safetensors.index.json", "pytorch_model*.bin.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.jinja", "additional_chat_templates/*.jinja"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *("README.md", "LICENSE*"),
)
_GENERATED = "generated_from_trainer"  # a tag of the cards that trainers of transformers and TRL write


class _Attempt(TypedDict):
    status: str


class _AdapterConfig(TypedDict, total=False):
    base_model_name_or_path: str | None


class _Record(TypedDict):
    subcommand: str
    attempts: list[_Attempt]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "push",
        description="Write a model card with evaluation, teacher, recipe and citation into the folder of a trained "
        "model, and upload the model to the hub, as a private repository unless --public is given. Checkpoints, "
        "run.json, run.yaml and other files of the run stay here. HF_TOKEN or `hf auth login` gives access.",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a model or an adapter")
    parser.add_argument("--repo_id", required=True, help="repository on the hub, OWNER/NAME")
    parser.add_argument("--evaluation", type=Path, help="folder that `minillm-trl evaluate` wrote for this model")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--card_only", action="store_true", help="write README.md into the folder and upload nothing")
    parser.add_argument("--overwrite_card", action="store_true", help="replace a README.md that no trainer wrote")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, check model and evaluation, write the card, and upload."""
    arguments = parse_plain(build_parser(), argv)
    is_adapter = _check_model(arguments.model)
    _check_repo_id(arguments.repo_id)
    from ..evaluation.model_card import build_card  # huggingface_hub and numpy take a second to import

    evaluation = None if arguments.evaluation is None else _read_evaluation(arguments.evaluation, arguments.model)
    subcommand, attempt = _read_record(arguments.model)
    recipe = arguments.model / "run.yaml"
    card = build_card(
        arguments.repo_id,
        evaluation,
        subcommand,
        attempt,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        is_adapter,
    )
    _write_card(arguments.model / "README.md", str(card), arguments.overwrite_card)
    if arguments.card_only:
        return 0
    return _upload(arguments.model, arguments.repo_id, arguments.public)


def _check_repo_id(repo_id: str) -> None:
    """Check the form of a repository's name before the card is written."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise UserError(f"--repo_id {repo_id}: expected OWNER/NAME.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {error}") from error


def _check_model(folder: Path) -> bool:
    """Return whether the folder holds an adapter."""
    from ..models.files import check_weights, is_lost_folder

    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: no config.json or adapter_config.json. Name the folder of a saved model.")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"--model {folder}: no weights. Did the training finish?")
    check_weights(str(folder))
    if is_adapter:
        path = folder / "adapter_config.json"
        base = read_json(path, _AdapterConfig, "Copy or save the adapter again.").get("base_model_name_or_path")
        if base is not None and (Path(base).exists() or is_lost_folder(base)):
            raise UserError(
                f"{path}: the adapter's base is the folder {base}, which nobody else has. Merge the adapter "
                "(minillm-trl merge) and push the result, or upload the base and set base_model_name_or_path to it."
            )
    return is_adapter


def _read_evaluation(folder: Path, model: Path) -> "EvaluatedModel":
    from ..evaluation.results import read_evaluation

    evaluation = read_evaluation(model.name, folder)
    for task, result in evaluation.tasks.items():
        evaluated = result.settings.get("adapter") or result.settings["model"]
        if Path(evaluated).resolve() != model.resolve():
            raise UserError(
                f"--evaluation {folder}: {task} was measured on {evaluated}, not on {model}. Name the results of "
                "this model."
            )
    return evaluation


def _read_record(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the subcommand and the last attempt of the run that made the model."""
    path = folder / "run.json"
    if not path.is_file():
        return None, {}
    record = read_json(path, _Record, "It is not the record of a training run; move it elsewhere.")
    attempt = record["attempts"][-1]
    if attempt["status"] != "finished":
        raise UserError(
            f"{path}: the run is {attempt['status']}, so the model may be unfinished. Resume the run first."
        )
    return record["subcommand"], attempt


def _write_card(path: Path, text: str, overwrite: bool) -> None:
    from ..evaluation.model_card import MARK

    if path.is_file() and not overwrite:
        before = path.read_text(encoding="utf-8")
        if MARK not in before and _GENERATED not in before:
            raise UserError(f"{path} was written by hand. --overwrite_card replaces it.")
    write_whole(path, text)
    print(f"Card written to {path}")


def _upload(folder: Path, repo_id: str, public: bool) -> int:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of a status or a broken connection

    api = HfApi()
    files = sorted({path.relative_to(folder).as_posix() for pattern in UPLOADED for path in folder.glob(pattern)})
    print(f"Uploading {', '.join(files)}")
    try:
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload by minillm-trl"
        )
    except (HTTPError, OSError) as error:  # OSError: no token, or offline mode
        raise UserError(
            f"{repo_id} could not be uploaded ({error}). Check the network, HF_TOKEN and its write access to "
            f"{repo_id.split('/')[0]}. The card is in {folder}; the same command uploads it again."
        ) from error
    print(f"Uploaded to {url}")
    return 0
