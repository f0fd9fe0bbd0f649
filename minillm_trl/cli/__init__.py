"""The command `minillm-trl`: find the subcommand, run it, and turn its errors into one clear message.

A subcommand is a module of its name with `build_parser()` and `run(argv) -> int`:

- `sft`, `kd`, `seqkd`, `minillm`: training. `training` has their shared checks, saving and resuming, `examples` loads
  their data, `recording` writes the run's record.
- `evaluate`, `benchmark`, `compare`, `judge`: measuring. `evaluate_options` has the parser and the checks of
  `evaluate`, `task_results` decides which tasks are done.
- `recipe` runs `stages`; `prepare_data`, `shrink`, `serve_teacher`, `offline_teacher`, `merge`, `push`, `generate`,
  `doctor` and `demo` are a command each.

Options: `arguments` parses the command line and YAML, `option_values` checks values and reports the YAML line of a bad
one, `option_names` maps aliases and offers the right name for a wrong one, `chat` adds the options for chat models,
and `launch` hands a subcommand over to `accelerate launch`.
"""

import difflib
import logging
import os
import signal
import sys
from importlib import import_module

from .. import __version__
from ..errors import UserError

# Imported only when chosen, since most take seconds to import
SUBCOMMANDS = {
    "demo": "train a teacher and a student on real data, distil, and write a report (CPU, minutes)",
    "prepare-data": "check, filter and split data; write it for the other subcommands",
    "shrink": "make a student out of a teacher: fewer layers, narrower feed-forward layers",
    "sft": "supervised fine-tuning of a teacher or a student",
    "kd": "word-level knowledge distillation (baseline)",
    "seqkd": "fine-tuning on the teacher's completions (baseline)",
    "minillm": "distil a teacher into a student with MiniLLM",
    "serve-teacher": "serve a teacher's log-probs to training runs over HTTP",
    "offline-teacher": "store a teacher's log-probs of given completions, to train without the teacher",
    "merge": "merge an adapter into its base model",
    "push": "write a model card with the evaluation, and upload a model to the hub",
    "generate": "sample completions from a model",
    "evaluate": "measure a model on prompts with references",
    "benchmark": "measure a model on general benchmarks (GSM8K, MATH, BBH, IFEval, ...) with lm-eval",
    "recipe": "run all stages of a recipe, from the data to the table",
    "compare": "compare evaluated models in one table",
    "judge": "let an LLM score answers against the references or another model",
    "doctor": "show what this machine can run, in which precision, and the launch command",
}

# Subcommands whose processes share the work. Several processes of another would each do all of it, in one folder.
_SHARED = ("sft", "kd", "seqkd", "minillm", "evaluate")

# Network requests that libraries make unasked. For a hub model without safetensors, transformers asks a service to
# convert the weights and sends it the user's token.
_SWITCHED_OFF = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_SAFETENSORS_CONVERSION")

# TRL's configurations import transformers, PEFT and with it bitsandbytes. On CPUs with AVX512-BF16, bitsandbytes then
# warns of a faster 4-bit kernel that could be installed, in every command and in each of its processes.
_KERNEL_ADVICE = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community")

_END = 1900  # characters kept at both ends of a message whose middle is left out

_USAGE = """\
usage: minillm-trl SUBCOMMAND [options]
       minillm-trl SUBCOMMAND --config FILE.yaml [options that override the file]

MiniLLM: on-policy distillation of large language models, as a trainer on TRL.

subcommands:
{subcommands}

`minillm-trl SUBCOMMAND --help` lists the options. The training subcommands also run under
`accelerate launch --config_file FILE -m minillm_trl SUBCOMMAND ...`, or hand themselves over to it with
`--accelerate_config NAME` (a file, or a name from recipes/accelerate_configs) and `--num_processes N`.
"""


def is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a log record is not bitsandbytes' advice to install a faster kernel: a filter of its logger."""
    return not str(record.msg).startswith(_KERNEL_ADVICE[1])


class AboveProgressBars(logging.Handler):
    """Prints warnings above a progress bar, on lines of their own; Python's own prints them into the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print to stderr."""
        from tqdm import tqdm  # slow to import; `--help` does not need it

        tqdm.write(self.format(record), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`list[str]`, *optional*): arguments without the program's name; those of the process by default.

    Returns:
        `int`: exit status: 0 for success, 2 for a mistake in the input, 3 for training stopped because the student
        degenerated, 130 after Ctrl-C, 141 if the reader of the output is gone. Exceptions other than [`UserError`] are
        bugs of the program or of a library: they propagate, so Python prints the traceback and exits with status 1.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for variable in _SWITCHED_OFF:
        os.environ.setdefault(variable, "1")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE.format(subcommands="\n".join(f"  {name:<12} {text}" for name, text in SUBCOMMANDS.items())))
        return 0
    if arguments[0] == "--version":
        print(f"minillm-trl {__version__}")
        return 0
    logging.lastResort = AboveProgressBars(logging.WARNING)
    logging.getLogger(_KERNEL_ADVICE[0]).addFilter(is_wanted)
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(SUBCOMMANDS)}."
        print(f"minillm-trl: unknown subcommand {name!r}. {hint}", file=sys.stderr)
        return 2
    try:
        _check_launch(name)
        return import_module(f".{name.replace('-', '_')}", __name__).run(rest)
    except KeyboardInterrupt as stop:  # code that knows how to continue has added a note
        advice = " ".join(getattr(stop, "__notes__", [])) or _how_to_continue(name)
        print(f"\nminillm-trl {name}: stopped. {advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
        return 128 + signal.SIGPIPE
    except UserError as error:
        if os.environ.get("MINILLM_TRL_TRACEBACK") == "1":
            raise
        print(f"minillm-trl {name}: {printed(error)}", file=sys.stderr)
        print("(MINILLM_TRL_TRACEBACK=1 shows where this was raised.)", file=sys.stderr)
        return 2


def _check_launch(name: str) -> None:
    if name not in _SHARED and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} runs in one process. Start it without `accelerate launch` or `torchrun`.")


def printed(error: BaseException) -> str:
    """Return the message of an error, shortened in the middle if it is very long (it may quote any input)."""
    message = str(error)
    if len(message) <= 2 * _END:
        return message
    return f"{message[:_END]} ... ({len(message) - 2 * _END} characters) ... {message[-_END:]}"


def _how_to_continue(name: str) -> str:
    if name in ("demo", "recipe"):
        return "The same command continues from the last finished stage or checkpoint."
    return "Run the same command again."
