"""Names of options: aliases, what was given twice, and the right name for a wrong one."""

import argparse
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import UserError

# Names in other trainers, in the authors' code and in older releases of transformers and TRL, with the options of ours
# that mean the same: the first of them that a subcommand has is offered. Similar letters would lead astray.
ELSEWHERE = {
    "adam_eps": ("adam_epsilon",),
    "alpha": ("teacher_mixed_alpha", "kd_ratio"),
    "base_model": ("model", "model_name_or_path"),
    "batch_size": ("per_device_train_batch_size",),
    "ckpt_name": ("model_name_or_path", "model"),
    "clip_grad": ("max_grad_norm",),
    "cliprange": ("epsilon",),
    "cutoff_len": ("max_length",),
    "data": ("dataset_name", "dataset", "source"),
    "data_dir": ("dataset_name", "dataset", "source"),
    "data_path": ("dataset_name", "dataset", "source"),
    "dataset": ("dataset_name", "source"),
    "dataset_name": ("dataset", "source"),
    "dataset_test_split": ("split",),
    "deepspeed_config": ("deepspeed",),
    "epochs": ("num_train_epochs",),
    "eval_batch_size": ("per_device_eval_batch_size", "batch_size"),
    "eval_file": ("eval_dataset",),
    "eval_interval": ("eval_steps",),
    "evaluation_strategy": ("eval_strategy",),
    "flash_attn": ("attn_implementation",),
    "grad_accum": ("gradient_accumulation_steps",),
    "kl_coef": ("beta",),
    "length_norm": ("length_normalization",),
    "lm_data_dir": ("lm_dataset",),
    "local_batch_size": ("per_device_train_batch_size",),
    "log_interval": ("logging_steps",),
    "lora_dim": ("lora_r",),
    "lora_rank": ("lora_r",),
    "lora_target": ("lora_target_modules",),
    "lr": ("learning_rate",),
    "lr_decay_style": ("lr_scheduler_type",),
    "lr_scheduler": ("lr_scheduler_type",),
    "max_completion_length": ("max_new_tokens",),
    "max_new_tokens": ("max_completion_length", "max_tokens"),
    "max_samples": ("max_train_rows", "max_rows"),
    "max_seq_len": ("max_length", "lm_max_length"),
    "max_seq_length": ("max_length", "lm_max_length"),
    "micro_batch_size": ("per_device_train_batch_size",),
    "model": ("model_name_or_path",),
    "model_dtype": ("dtype",),
    "model_id": ("model_name_or_path", "model"),
    "model_name": ("model_name_or_path", "model"),
    "model_name_or_path": ("model",),
    "model_path": ("model_name_or_path", "model"),
    "no_cuda": ("use_cpu",),
    "num_epochs": ("num_train_epochs",),
    "num_return_sequences": ("num_generations", "num_samples"),
    "out_dir": ("output_dir", "output"),
    "output": ("output_dir",),
    "output_dir": ("output",),
    "per_device_batch_size": ("per_device_train_batch_size",),
    "ppo_epochs": ("num_iterations",),
    "prompt_data_dir": ("dataset_name",),
    "response_column": ("completion_column",),
    "resume": ("resume_from_checkpoint",),
    "reward_scaling": ("reward_scale",),
    "samples_per_prompt": ("num_generations", "num_samples"),
    "save": ("output_dir",),
    "save_dir": ("output_dir",),
    "save_interval": ("save_steps",),
    "single_step_reg": ("single_step_decomposition",),
    "split": ("dataset_train_split", "dataset_split"),
    "student": ("model_name_or_path", "model"),
    "student_model": ("model_name_or_path", "model"),
    "teacher_ckpt": ("teacher_model_name_or_path", "teacher"),
    "teacher_model": ("teacher_model_name_or_path", "teacher"),
    "teacher_model_path": ("teacher_model_name_or_path", "teacher"),
    "teacher_name_or_path": ("teacher_model_name_or_path", "teacher"),
    "teacher_path": ("teacher_model_name_or_path", "teacher"),
    "text_column": ("dataset_text_field", "lm_text_column"),
    "tokenizer_name": ("tokenizer",),
    "torch_dtype": ("dtype",),
    "total_iters": ("max_steps",),
    "train_batch_size": ("per_device_train_batch_size",),
    "train_file": ("dataset_name",),
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size",),
    "training_file": ("dataset_name",),
    "validation_file": ("eval_dataset",),
    "validation_split": ("dataset_test_split",),
    "warmup_iters": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
}
# Of those that have no option of the same meaning
_NOTES = {
    "dataset_streaming": "Examples are read whole; only the corpus of minillm can be streamed, with lm_streaming.",
    "max_prompt_length": "Prompts are never cut: `minillm-trl prepare-data --max_prompt_length` drops longer ones.",
    "messages_column": "Name the column of whole conversations with prompt_column.",
    "teacher": "Teachers are for kd, seqkd, minillm and evaluate.",
    "teacher_model_name_or_path": "Teachers are for kd, seqkd, minillm and evaluate.",
}


def right_name(name: str, known: Iterable[str]) -> str:
    """Return a sentence that offers the option for a wrong name, with a leading space; empty if there is none.

    Args:
        name (`str`): as it was given, without its dashes; with `-` or `_`.
        known (`Iterable[str]`): the options that there are.
    """
    name, known = name.replace("-", "_"), list(known)
    found = [option for option in ELSEWHERE.get(name, ()) if option in known]
    if not found and name in _NOTES:
        return f" {_NOTES[name]}"
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def aliases(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the second names of options, as a YAML file may have them, with the first ones."""
    return {
        name: action.dest
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and (name := option[2:].replace("-", "_")) not in (action.dest, f"no_{action.dest}")
    }


@dataclass(frozen=True)
class GivenOption:
    """An option of a command line.

    Attributes:
        word (`str`): the option as it was given, with its dashes; empty for the words before the first option.
        action (`argparse.Action`, *optional*): the parser's; None where it has none of this name.
        values (`tuple[str, ...]`): the words that follow.
    """

    word: str
    action: argparse.Action | None
    values: tuple[str, ...]


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Iterator[GivenOption]:
    """Return the options of a command line, without judging them.

    Args:
        parser (`argparse.ArgumentParser`): whose options have two dashes.
        argv (`Sequence[str]`): the words, up to `--` at most, after which argparse takes all for positional ones.
    """
    word, values = "", []
    for part in argv[: argv.index("--") if "--" in argv else None]:
        name, equals, value = part.partition("=")
        if not name.startswith("--") or " " in name:  # argparse takes a word with a space for a value
            values.append(part)
            continue
        yield GivenOption(word, parser._option_string_actions.get(word), tuple(values))
        word, values = name, [value] if equals else []
    yield GivenOption(word, parser._option_string_actions.get(word), tuple(values))


def check_given_once(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse options of which argparse would drop a value that the user still counts on.

    These are configuration files, and options that were given by two of their names. Any other option may be repeated,
    so that words at the end of a command override those in it.

    Raises:
        UserError: naming both.
    """
    first: dict[str, GivenOption] = {}
    for option in given_options(parser, argv):
        if option.action is None:
            continue
        name, before = option.action.dest, first.get(option.action.dest)
        if before is None or before.values == option.values:
            first.setdefault(name, option)
            continue
        given = [" ".join((each.word, *each.values)) for each in (before, option)]
        if name == "config":
            raise UserError(f"{given[0]} and {given[1]}: one of these files would be ignored. Put both into one.")
        if _spelling(before) != _spelling(option):
            raise UserError(f"{given[0]} and {given[1]}: these are two names of one option. Drop one of them.")


def _spelling(option: GivenOption) -> str:
    return option.word.replace("-", "_").removeprefix("__").removeprefix("no_")


def check_stray_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse words that belong to no option, before argparse complains about options that are missing without them.

    Raises:
        UserError: naming the first of them, and `--config` for a YAML file.
    """
    if any(not action.option_strings for action in parser._actions):
        return  # they are its positional arguments
    room = {None: 1, "?": 1, 0: 0}
    for option in given_options(parser, argv):
        if option.word and (option.action is None or option.action.nargs not in room):
            continue
        most = room[option.action.nargs] if option.action is not None else 0
        for stray in option.values[most:]:
            raise stray_word(parser, stray)


def stray_word(parser: argparse.ArgumentParser, word: str) -> UserError:
    """Return the error for a word that belongs to no option."""
    if word.endswith((".yaml", ".yml")) and "--config" in parser._option_string_actions:
        return UserError(f"unexpected {word!r}: it belongs to no option. Did you mean `--config {word}`?")
    return UserError(f"unexpected {word!r}: it belongs to no option. Quote values that hold spaces.")
