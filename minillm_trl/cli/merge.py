"""`minillm-trl merge`: merge an adapter into its base, and save the result as a plain model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import UserError
from ..files.json_files import read_json
from ..files.whole_files import whole_folder, writing
from ..models.multimodal import refuse_multimodal
from .arguments import PlainParser, parse_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.adapters import Adapter

_NOTE = (
    "An adapter trained on quantised weights (QLoRA) is merged into the full-precision weights, so the result differs "
    "slightly from the model in training."
)


class _Attempt(TypedDict):
    configuration: dict[str, dict[str, Any]]


class _Record(TypedDict):
    """The fields of `run.json` that are read here."""

    attempts: list[_Attempt]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "merge",
        description="Merge an adapter (LoRA, DoRA and others of PEFT that change weights) into its base, and save "
        f"model, generation configuration and tokenizer as a plain model. {_NOTE}",
    )
    parser.add_argument("--adapter", required=True, help="name or folder of a PEFT adapter")
    parser.add_argument("--model", help="name or folder of its base (default: as recorded in the adapter)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the merged model")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="dtype of the merged weights (default: auto, the base's)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in output_dir, if there is one")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, check adapter, base and folders before any model is loaded, merge, and save."""
    return _merge(parse_plain(build_parser(), argv))


def _merge(arguments: argparse.Namespace) -> int:
    # torch and peft take seconds to import, and `--help` does not need them
    import torch

    from ..models.adapters import find_adapter
    from ..models.files import check_model_folder, explained
    from ..models.generation_config import make_saveable

    adapter = find_adapter(arguments.adapter, arguments.model, arguments.trust_remote_code)
    output = arguments.output_dir.resolve()
    check_model_folder(output, {"adapter": adapter.name, "base": adapter.base}, arguments.overwrite)
    if getattr(adapter.base_config, "quantization_config", None) is not None:
        raise UserError(
            f"the base {adapter.base!r} is stored quantised. Name the full-precision model that it was made from: "
            f"--model NAME_OR_FOLDER --adapter {adapter.name}."
        )
    refuse_multimodal(adapter.base_config, f"the base {adapter.base!r} of the adapter {adapter.name!r}")
    tokenizer, problem = _find_tokenizer(adapter, arguments.trust_remote_code)
    print(f"Merging {adapter.name} into {adapter.base}.{_caveat(Path(adapter.name))}")
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = adapter.load_merged(dtype, arguments.trust_remote_code, arguments.allow_pickled_weights, progress=True)
    make_saveable(model.generation_config, repr(adapter.name))
    with writing(output), whole_folder(output) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            with explained(f"the tokenizer of {adapter.name!r} cannot be saved"):
                tokenizer.save_pretrained(folder)
    print(f"Saved to {output} in {model.dtype}")
    if problem is not None:
        print(f"warning: saved without a tokenizer, so copy one to {output}: {problem}", file=sys.stderr)
    return 0


def _caveat(adapter: Path) -> str:
    """Return the note on QLoRA, with a leading space; empty if the run's record shows no quantisation."""
    from ..training.run_record import RECORD

    for folder in (adapter, adapter.parent):  # a checkpoint is in the folder of its run
        if (path := folder / RECORD).is_file():
            record = read_json(path, _Record, "Merge a copy of the adapter alone.")
            return f" {_NOTE}" if any(map(_is_quantised, record["attempts"])) else ""
    return f" {_NOTE}"


def _is_quantised(attempt: _Attempt) -> bool:
    return any(
        values.get("load_in_4bit")
        or values.get("load_in_8bit")
        or "quantization" in str(values.get("model_init_kwargs"))
        for values in attempt["configuration"].values()
    )


def _find_tokenizer(
    adapter: "Adapter", trust_remote_code: bool
) -> "tuple[PreTrainedTokenizerBase | None, str | None]":
    """Return the tokenizer of the adapter or its base, or why it cannot be read: weights can be merged without it."""
    from ..models.loading import read_tokenizer

    name, revision = adapter.tokenizer_source()
    try:
        return read_tokenizer(name, revision, trust_remote_code), None
    except UserError as error:
        if name == adapter.name:  # its own does not load, and the base's may differ
            raise
        return None, str(error)
