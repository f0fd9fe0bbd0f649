"""Names of options: aliases, options given twice, and the right name for a wrong one."""

import argparse
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import UserError

# Names in other trainers, the authors' code and older releases of transformers and TRL, with our options of the same
# meaning: the first one that a subcommand has is suggested. The most similar spelling would often be wrong.
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
# Advice for names without an equivalent option
_NOTES = {
    "ignore_bias_buffers": "TRL's script declares it and does not read it. Drop it.",
    "max_prompt_length": "Prompts are never cut: `minillm-trl prepare-data --max_prompt_length` drops longer ones.",
    "messages_column": "Name the column of whole conversations with prompt_column.",
    "teacher": "Teachers are for kd, seqkd, minillm and evaluate.",
    "teacher_model_name_or_path": "Teachers are for kd, seqkd, minillm and evaluate.",
}


def right_name(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the right option for a wrong name, with a leading space; empty if there is none.

    Args:
        name (`str`): as given, without the leading dashes; with `-` or `_`.
        known (`Iterable[str]`): the options of the subcommand.
    """
    name, known = name.replace("-", "_"), list(known)
    found = [option for option in ELSEWHERE.get(name, ()) if option in known]
    if not found and name in _NOTES:
        return f" {_NOTES[name]}"
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def aliases(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return a map from the aliases of options, as in YAML, to their names."""
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
        word (`str`): the option as given, with its dashes; empty for the words before the first option.
        action (`argparse.Action`, *optional*): the parser's; None for an unknown option.
        values (`tuple[str, ...]`): the words that follow.
    """

    word: str
    action: argparse.Action | None
    values: tuple[str, ...]


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Iterator[GivenOption]:
    """Yield the options of a command line, unchecked.

    Args:
        parser (`argparse.ArgumentParser`): with options that have two dashes.
        argv (`Sequence[str]`): the words; those after `--`, which argparse takes as positional, are ignored.
    """
    word, values = "", []
    for part in argv[: argv.index("--") if "--" in argv else None]:
        name, equals, value = part.partition("=")
        if not name.startswith("--") or " " in name:  # argparse takes a word with a space as a value
            values.append(part)
            continue
        yield GivenOption(word, parser._option_string_actions.get(word), tuple(values))
        word, values = name, [value] if equals else []
    yield GivenOption(word, parser._option_string_actions.get(word), tuple(values))


def check_given_once(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse repeated options where argparse would silently drop a value that the user expects to count.

    These are configuration files, and options given by two of their names. Any other option may be repeated, so that
    words appended to a command override earlier ones.

    Raises:
        UserError: names both.
    """
    first: dict[str, GivenOption] = {}
    for option in given_options(parser, argv):
        if option.action is None:
            continue
        name, before = option.action.dest, first.get(option.action.dest)
        if before is None or before.values == option.values:
            first.setdefault(name, option)
            continue
        given = [" ".join((one.word, *one.values)) for one in (before, option)]
        if name == "config":
            raise UserError(
                f"{given[0]} and {given[1]}: one of these files would be ignored. Merge them into one file."
            )
        if _spelling(before) != _spelling(option):
            raise UserError(f"{given[0]} and {given[1]}: these are two names of the same option. Drop one of them.")


def _spelling(option: GivenOption) -> str:
    return option.word.replace("-", "_").removeprefix("__").removeprefix("no_")


def check_stray_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse words that belong to no option, before argparse reports missing options.

    Raises:
        UserError: names the first word, and `--config` if it is a YAML file.
    """
    if any(not action.option_strings for action in parser._actions):
        return  # they are positional arguments
    room = {None: 1, "?": 1, 0: 0}
    for option in given_options(parser, argv):
        if option.word and (option.action is None or option.action.nargs not in room):
            continue
        capacity = room[option.action.nargs] if option.action is not None else 0
        for stray in option.values[capacity:]:
            raise stray_word(parser, stray)


def stray_word(parser: argparse.ArgumentParser, word: str) -> UserError:
    """Return the error for a word that belongs to no option."""
    if word.endswith((".yaml", ".yml")) and "--config" in parser._option_string_actions:
        return UserError(f"unexpected {word!r}: it belongs to no option. Did you mean `--config {word}`?")
    return UserError(f"unexpected {word!r}: it belongs to no option. Quote values that contain spaces.")
