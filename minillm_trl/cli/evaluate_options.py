"""Options of `minillm-trl evaluate`, and the checks that no data or model is needed for."""

import argparse
from pathlib import Path

from ..errors import UserError
from ..evaluation.decodings import GREEDY, Decoding
from ..evaluation.tasks import NAMED_TASKS
from .arguments import PlainParser
from .chat import add_chat_options

PAPER_SEEDS = (10, 20, 30, 40, 50)
# Options that sampled results depend on
SAMPLING = (
    *("seeds", "greedy", "temperature", "no_repeat_ngram_size", "max_new_tokens"),
    *("forward_kl", "exposure_bias_samples"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = PlainParser(
        "evaluate",
        description="Sample completions as the paper does (temperature 1, five seeds, no repeated 6-grams as in its "
        "code) and measure Rouge-L, exact match, loss, length, repetition, diversity and, with a teacher, divergence: "
        "means over prompts with 95 % intervals. Tasks with results in output_dir are skipped.",
        epilog="`--num_processes N` and the other options of `accelerate launch` hand the command over to it.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with values for any of these options")
    parser.add_argument("--model", required=True, help="name or folder of a model, or of a PEFT adapter alone")
    parser.add_argument("--adapter", help="name or folder of a PEFT adapter for the model")
    parser.add_argument(
        *("--teacher", "--teacher_model_name_or_path"),
        help="name or folder of a teacher, for divergences (skipped when the model is the teacher)",
    )
    _add_data_options(parser)
    _add_measuring_options(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded together (default: 64)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for results.json and samples.jsonl")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="dtype of model and teacher (default: auto, as saved; trained models are often saved in float32)",
    )
    add_chat_options(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", "--dataset_name", help="prompts with references, see `minillm-trl sft --help`")
    source.add_argument(
        *("--tasks", "--task"),
        nargs="+",
        metavar="TASK",
        help=f"each a name ({', '.join(NAMED_TASKS)}), a dataset, or NAME=DATASET, with a folder of its name in "
        "output_dir; in YAML a list or a mapping",
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="folder with what prepare-data wrote (default: data)"
    )
    parser.add_argument("--split", default="test", help="split of the datasets (default: test)")
    parser.add_argument(
        "--validation_split",
        help="evaluate --temperatures on this split too, in the folder `validation`, so that `compare` can choose one",
    )
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--completion_column", default="completion")
    parser.add_argument("--references_column", default="references")
    parser.add_argument("--max_rows", type=int, help="use the first prompts only")


def _add_measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", help="sampling seeds (default: 10 20 30 40 50)")
    parser.add_argument("--greedy", action="store_true", help="decode greedily, once, instead of sampling")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit (default: 256)")
    parser.add_argument("--temperature", type=float, help="sampling temperature (default: 1)")
    parser.add_argument(
        "--temperatures",
        type=temperature_or_greedy,
        nargs="+",
        metavar="T",
        help=f"evaluate at each of these temperatures (`{GREEDY}`: greedy decoding), each with a folder such as "
        "temperature_0.7; instead of --temperature and --greedy",
    )
    parser.add_argument(
        "--teacher_temperature",
        type=float,
        help="temperature of the teacher in the divergences (default: 1 with --temperatures, else --temperature)",
    )
    parser.add_argument(
        "--no_repeat_ngram_size",
        type=int,
        default=6,
        help="block n-grams of this size that occur earlier in prompt or completion; 0 blocks none (default: 6, as in "
        "the paper's code)",
    )
    parser.add_argument("--forward_kl", action="store_true", help="sample from the teacher too, for forward KL")
    parser.add_argument(
        "--no_loss", action="store_true", help="leave out the loss of the references, which takes a forward pass"
    )
    parser.add_argument(
        "--exposure_bias_samples",
        type=int,
        default=0,
        help="samples of model and teacher per prompt, for exposure bias (default: 0, not measured; the paper: 10)",
    )
    parser.add_argument(
        "--label_words",
        nargs="+",
        metavar="WORD",
        help="classify instead of sampling: accuracy and calibration over these words, which are the completions. "
        "Include the leading space (' positive') if prompts end without one",
    )


def temperature_or_greedy(text: str) -> Decoding:
    """Parse a value of `--temperatures`; [`Decoding`] has the allowed range."""
    if text == GREEDY:
        return Decoding(None)
    try:
        return Decoding(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a temperature above 0 or `{GREEDY}`, got {text!r}") from None


def check_options(arguments: argparse.Namespace) -> None:
    """Check the values, and fill in the defaults that depend on others.

    Raises:
        ValueError: for a value that is out of range, has no effect, or excludes another.
    """
    _check_numbers(arguments)
    if arguments.label_words is not None:
        _check_classification(arguments)
    elif arguments.temperatures is not None:
        _check_decodings(arguments)
    elif arguments.validation_split is not None:
        raise UserError("--validation_split chooses among --temperatures. Give them, or leave it out.")
    elif arguments.greedy:
        if arguments.teacher is not None:
            raise UserError(
                "--teacher measures divergences on samples. Drop it, or use `--temperatures greedy` instead of "
                "--greedy, for the divergence of the greedy completion."
            )
        if arguments.seeds is not None or arguments.temperature not in (None, 1):
            raise UserError("--greedy takes the most likely tokens: --seeds and --temperature have no effect with it.")
        arguments.seeds = []
    if arguments.seeds is None:
        arguments.seeds = list(PAPER_SEEDS)
    if arguments.temperature is None:
        arguments.temperature = 1.0


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "temperature", "teacher_temperature", "batch_size", "max_rows"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value}.")
    for name in ("no_repeat_ngram_size", "exposure_bias_samples"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} must not be negative, got {getattr(arguments, name)}.")
    for name in ("forward_kl", "exposure_bias_samples", "teacher_temperature"):
        if getattr(arguments, name) and arguments.teacher is None and arguments.label_words is None:
            raise UserError(f"--{name} needs --teacher.")
    if arguments.seeds is not None:
        if min(arguments.seeds) < 0:
            raise UserError(f"--seeds must not be negative, got {min(arguments.seeds)}.")
        if len(set(arguments.seeds)) < len(arguments.seeds):
            raise UserError(f"--seeds repeats a seed: {arguments.seeds}. The same seed gives the same samples.")


def _check_decodings(arguments: argparse.Namespace) -> None:
    """Check `--temperatures` and the options that depend on it."""
    for name in ("temperature", "greedy"):
        if getattr(arguments, name):
            raise UserError(
                f"--temperatures and --{name} exclude each other. Drop --{name}, also from the --config file, or list "
                "it among the temperatures."
            )
    decodings = arguments.temperatures
    for decoding in decodings:
        if decodings.count(decoding) > 1:
            raise UserError(f"--temperatures names {decoding} twice. Drop one of them.")
    if arguments.seeds is not None and decodings == [Decoding(None)]:
        raise UserError("--seeds has no effect with `--temperatures greedy`, which samples nothing. Drop one of them.")
    if arguments.validation_split == arguments.split:
        raise UserError(
            f"--validation_split {arguments.split} is --split too. Choose the temperature on another split than the "
            "one that is reported."
        )
    if arguments.teacher is not None and arguments.teacher_temperature is None:
        arguments.teacher_temperature = 1.0  # the student should match the teacher as it is
    if arguments.exposure_bias_samples and Decoding(arguments.teacher_temperature) not in decodings:
        raise UserError(
            "--exposure_bias_samples compares both models at the teacher's temperature, and "
            f"{arguments.teacher_temperature:g} is not among --temperatures. Add it, or drop --exposure_bias_samples."
        )


def _check_classification(arguments: argparse.Namespace) -> None:
    """Check the words, and refuse options of sampling, which would have no effect."""
    if len({word.strip() for word in arguments.label_words} - {""}) < max(2, len(arguments.label_words)):
        raise UserError(f"--label_words needs at least two different words, got {arguments.label_words}.")
    parser = build_parser()
    for name in (
        *SAMPLING,
        "temperatures",
        "validation_split",
        "teacher_temperature",
        "teacher",
        "no_loss",
        "eos_tokens",
    ):
        defaults = (parser.get_default(name), 1.0) if name == "temperature" else (parser.get_default(name),)
        if getattr(arguments, name) not in defaults:
            raise UserError(f"--{name} has no effect with --label_words, which samples nothing. Drop one of them.")
    arguments.seeds = []
