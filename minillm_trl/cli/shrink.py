"""`minillm-trl shrink`: make a student out of a teacher, by dropping layers and narrowing feed-forward layers."""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from ..errors import UserError
from ..files.json_files import read_json
from ..files.whole_files import whole_folder, writing
from .arguments import PlainParser, parse_with_config
from .option_values import json_object

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_EXAMPLE = """\
example:
  minillm-trl shrink --model HuggingFaceTB/SmolLM2-135M-Instruct --num_layers 24 --intermediate_size 1024 \
    --dataset data/dolly --output_dir runs/student

  keeps 24 of 30 layers (the first, the last, and others at equal distances), and the 1,024 most active of the 1,536
  channels in each. Add --by influence to keep the layers that change the hidden states most. The result writes no
  sentences: before MiniLLM, train it on the teacher's answers (seqkd --generate_only, then kd --kd_ratio 1).
"""


RECORD = "shrink.json"  # in the student's folder; training writes to another folder, so it marks an unhealed student


class _Record(TypedDict):
    settings: dict[str, Any]
    layers: list[int]
    parameters: list[int]  # of teacher and student, as the two below
    parameters_per_token: list[int]
    loss: NotRequired[list[float]]  # nats a token


class _Pairs:
    """Tokens of a dataset: prompts with their completions, cut to a length."""

    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]]):
        self.prompt_ids, self.completion_ids = (list(ids) for ids in zip(*pairs, strict=True))

    def batches(self, batch_size: int, device: "torch.device") -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Yield ids and attention masks of prompts with completions, padded on the right."""
        import torch

        rows = [[*prompt, *ids] for prompt, ids in zip(self.prompt_ids, self.completion_ids, strict=True)]
        for start in range(0, len(rows), batch_size):
            part = [torch.tensor(ids, device=device) for ids in rows[start : start + batch_size]]
            pad = torch.nn.utils.rnn.pad_sequence
            yield pad(part, batch_first=True), pad([torch.ones_like(ids) for ids in part], batch_first=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "shrink",
        description="Make a student out of a teacher: drop decoder layers and, on request, channels of the "
        "feed-forward layers. Tokenizer, chat template and generation configuration come along.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with values for any of these options")
    parser.add_argument("--model", required=True, help="name or folder of the teacher")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the student")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num_layers", type=int, help="how many layers to keep (default: all)")
    number.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="which layers to keep, from 0")
    parser.add_argument(
        "--by",
        choices=["spacing", "influence"],
        default="spacing",
        help="keep layers at equal distances (default), or those that change the hidden states most (ShortGPT)",
    )
    parser.add_argument(
        "--intermediate_size",
        type=int,
        help="channels of a feed-forward layer to keep: the most active ones (Minitron)",
    )
    data = parser.add_argument_group(
        "calibration", "What influence and activity are measured on, and the loss before and after"
    )
    data.add_argument("--dataset", help="prompts with completions, see `minillm-trl sft --help`")
    data.add_argument("--split", default="train", help="split of the dataset (default: train)")
    data.add_argument("--prompt_column", default="prompt")
    data.add_argument("--completion_column", default="completion")
    data.add_argument("--chat_template_kwargs", type=json_object, metavar="JSON", help="passed to the chat template")
    data.add_argument("--max_rows", type=int, default=128, help="use the first rows only (default: 128)")
    data.add_argument("--max_length", type=int, default=512, help="truncate rows to this many tokens (default: 512)")
    data.add_argument("--batch_size", type=int, default=8, help="rows of one forward pass (default: 8)")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in output_dir, if there is one")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, check folders and data before the model is loaded, shrink, and save.

    A folder that holds the result of the same settings, model and data is left as it is.
    """
    arguments, launch = parse_with_config(build_parser(), argv)
    if launch:
        raise UserError(f"{next(iter(launch))}: shrink runs in a single process. Leave the option out.")
    _check(arguments)
    examples = None if arguments.dataset is None else _load_examples(arguments)
    settings = _settings(arguments, examples)
    if not arguments.overwrite and (found := read_settings(arguments.output_dir)) is not None:
        differing = {name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name)}
        if not differing:
            print(f"{arguments.output_dir} holds this student already (--overwrite makes it again).")
            return 0
        if differing <= _FILES.keys():  # other options: refused as any folder that is not empty
            _refuse_other_files(arguments, differing)
    return _shrink(arguments, settings, examples)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings by which the model in a folder was shrunk; None if it was not, or was trained since.

    Raises:
        ValueError: if the file with them is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    return read_json(path, _Record, "Delete it if the folder holds a model that you want to keep.")["settings"]


def _settings(arguments: argparse.Namespace, examples: "Dataset | None") -> dict[str, Any]:
    """Return the options that the student depends on, with digests of a local model's files and of the rows."""
    from ..models.fingerprints import model_fingerprint

    names = ("model", "num_layers", "layers", "by", "intermediate_size", "dtype")
    data = ("dataset", "split", "prompt_column", "completion_column", "chat_template_kwargs", "max_rows", "max_length")
    settings = {name: getattr(arguments, name) for name in (*names, *(data if arguments.dataset else ()))}
    settings["model_files"] = model_fingerprint(Path(arguments.model))
    if examples is not None:
        settings["data_sha256"] = _digest(examples)
    return settings


def _digest(examples: "Dataset") -> str:
    digest = hashlib.sha256()
    for row in examples.select_columns(["prompt", "completion"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


_FILES = {"model_files": "model", "data_sha256": "dataset"}  # digests in the settings, and their options


def _refuse_other_files(arguments: argparse.Namespace, differing: set[str]) -> None:
    """Refuse a student that was made with the same options from a model or data that has changed since."""
    options = [f"--{option} {getattr(arguments, option)}" for name, option in _FILES.items() if name in differing]
    raise UserError(
        f"--output_dir {arguments.output_dir}: this folder holds a student of the same options, but not of the same "
        f"files: the content of {' and of '.join(options)} has changed since, or {RECORD} does not record it. Add "
        "--overwrite to make the student again."
    )


def _check(arguments: argparse.Namespace) -> None:
    for name in ("num_layers", "intermediate_size", "max_rows", "max_length", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be positive, got {value}.")
    if arguments.num_layers is None and arguments.layers is None and arguments.intermediate_size is None:
        raise UserError("nothing to shrink: give --num_layers, --layers or --intermediate_size.")
    if arguments.by == "influence" and arguments.num_layers is None:
        raise UserError("--by influence chooses the layers: give --num_layers, how many to keep.")
    for name, needed in (
        ("by influence", arguments.by == "influence"),
        ("intermediate_size", arguments.intermediate_size),
    ):
        if needed and arguments.dataset is None:
            raise UserError(f"--{name} is measured on data: give --dataset.")


def _shrink(arguments: argparse.Namespace, settings: dict[str, Any], examples: "Dataset | None") -> int:
    # torch and transformers take seconds to import, and `--help` does not need them
    from ..models.files import check_model_folder
    from ..models.generation_config import make_saveable
    from ..models.loading import load_config, load_model, load_tokenizer
    from ..models.shrink import Sizes, shrink

    output = arguments.output_dir.resolve()
    check_model_folder(output, {"model": arguments.model}, arguments.overwrite)
    _check_sizes(arguments, load_config(arguments.model, arguments.trust_remote_code))
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    pairs = None if examples is None else _encode_pairs(arguments, examples, tokenizer)
    teacher = load_model(
        arguments.model,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        allow_pickled_weights=arguments.allow_pickled_weights,
    )
    make_saveable(teacher.generation_config, repr(arguments.model))
    layers = _choose_layers(arguments, teacher, pairs)
    channels = _choose_channels(arguments, teacher, pairs)
    student = shrink(teacher, layers, channels)
    sizes = [Sizes.of(model) for model in (teacher, student)]
    record: _Record = {
        "settings": settings,
        "layers": layers,
        "parameters": [size.total for size in sizes],
        "parameters_per_token": [size.per_token for size in sizes],
    }
    if pairs is not None:
        record["loss"] = [_mean_loss(model, pairs, arguments.batch_size) for model in (teacher, student)]
    with writing(output), whole_folder(output) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _report(record, arguments)
    return 0


def _check_sizes(arguments: argparse.Namespace, config: "PreTrainedConfig") -> None:
    from ..models.layers import intermediate_size

    config = config.get_text_config()
    number = config.num_hidden_layers
    if arguments.num_layers is not None and not 2 <= arguments.num_layers <= number:
        raise UserError(
            f"--num_layers {arguments.num_layers}: {arguments.model} has {number} layers; keep 2 to {number}."
        )
    for layer in arguments.layers or ():
        if not 0 <= layer < number:
            raise UserError(f"--layers {layer}: {arguments.model} has layers 0 to {number - 1}.")
    if arguments.layers is not None and sorted(set(arguments.layers)) != arguments.layers:
        raise UserError(f"--layers {' '.join(map(str, arguments.layers))}: name each layer once, in ascending order.")
    if arguments.intermediate_size is not None and arguments.intermediate_size > (width := intermediate_size(config)):
        raise UserError(
            f"--intermediate_size {arguments.intermediate_size}: {arguments.model} has {width} channels only."
        )


def _load_examples(arguments: argparse.Namespace) -> "Dataset":
    from ..data import load_examples

    return load_examples(
        arguments.dataset,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        require_completion=True,
        max_rows=arguments.max_rows,
    )


def _encode_pairs(arguments: argparse.Namespace, examples: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> _Pairs:
    from ..models.encoding import encode_pair

    pairs = []
    for row in examples:
        prompt, completion = encode_pair(tokenizer, row["prompt"], row["completion"], arguments.chat_template_kwargs)
        prompt = prompt[: arguments.max_length]
        if completion := completion[: arguments.max_length - len(prompt)]:
            pairs.append((prompt, completion))
    if not pairs:
        raise UserError(
            f"--max_length {arguments.max_length} cuts off every completion of {arguments.dataset}. Raise it."
        )
    return _Pairs(pairs)


def _choose_layers(arguments: argparse.Namespace, model: "PreTrainedModel", pairs: _Pairs | None) -> list[int]:
    from ..models.layer_importance import block_influence
    from ..models.layers import decoder_layers
    from ..models.shrink import evenly_spaced, most_influential

    number = len(decoder_layers(model)[1])
    if arguments.layers is not None:
        return arguments.layers
    if arguments.num_layers is None:
        return list(range(number))
    if arguments.by == "spacing":
        return evenly_spaced(number, arguments.num_layers)
    influence = block_influence(model, _progress(pairs, arguments, model, "Influence of layers"))
    return most_influential(influence, arguments.num_layers)


def _choose_channels(
    arguments: argparse.Namespace, model: "PreTrainedModel", pairs: _Pairs | None
) -> "list[torch.Tensor] | None":
    from ..models.layer_importance import channel_importance

    if arguments.intermediate_size is None:
        return None
    importance = channel_importance(model, _progress(pairs, arguments, model, "Activity of channels"))
    kept = arguments.intermediate_size
    return [
        values.argsort(descending=True, stable=True)[:kept].sort().values.to(model.device) for values in importance
    ]


def _progress(
    pairs: _Pairs | None, arguments: argparse.Namespace, model: "PreTrainedModel", title: str
) -> "Iterable[tuple[torch.Tensor, torch.Tensor]]":
    from tqdm.auto import tqdm

    assert pairs is not None  # `_check` requires a dataset for whatever is measured
    number = -(-len(pairs.prompt_ids) // arguments.batch_size)
    return tqdm(pairs.batches(arguments.batch_size, model.device), total=number, desc=title, unit=" batches")


def _mean_loss(model: "PreTrainedModel", pairs: _Pairs, batch_size: int) -> float:
    from ..evaluation.divergence import completion_losses

    losses = completion_losses(model, pairs.prompt_ids, pairs.completion_ids, batch_size=batch_size)
    return sum(map(sum, losses)) / sum(map(len, losses))


def _report(record: _Record, arguments: argparse.Namespace) -> None:
    (teacher, student), (before, after) = record["parameters"], record["parameters_per_token"]
    print(f"Kept layers {', '.join(map(str, record['layers']))}")
    print(f"{'':<26}{'teacher':>12}{'student':>12}{'ratio':>8}")
    print(f"{'parameters (million)':<26}{teacher / 1e6:>12.2f}{student / 1e6:>12.2f}{student / teacher:>8.2f}")
    print(f"{'  of a decoding step':<26}{before / 1e6:>12.2f}{after / 1e6:>12.2f}{after / before:>8.2f}")
    if "loss" in record:
        teacher_loss, student_loss = record["loss"]
        print(f"{'loss (nats a token)':<26}{teacher_loss:>12.3f}{student_loss:>12.3f}")
    print(f"Estimated speed-up of decoding: {before / after:.1f}x (weights that a step reads)")
    print(f"Saved to {arguments.output_dir}. Before MiniLLM, train it on the teacher's answers (docs/shrinking.md).")
