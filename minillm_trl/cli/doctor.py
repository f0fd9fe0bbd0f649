"""`minillm-trl doctor`: what this machine has, whether a configuration can run on it, and how to start it."""

import argparse
import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from ..errors import UserError
from ..models.weight_formats import quantization_settings
from ..training.trl_version import TESTED
from .arguments import PlainParser, TeacherArguments, parse, parse_plain
from .shrink import read_settings

# Functions import what takes seconds (torch, transformers, TRL's configurations): `--help` need not wait for it.
if TYPE_CHECKING:
    from ..config import MiniLLMConfig
    from ..hardware.machine import Machine

_GIB = 2**30
_MARGIN = 1.2  # for what a framework needs besides, and fragmentation
_SAVINGS = {
    "GPU": "shard_teacher, offload_teacher or a 4-bit teacher; teacher_hidden_states: cpu; a smaller "
    "per_device_train_batch_size or sampling_batch_size; an adapter (use_peft), its base in 4 bits or, by dtype, in "
    "half precision.",
    "CPU": "a smaller per_device_train_batch_size or sampling_batch_size; an adapter (use_peft); bf16.",
}


def build_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = PlainParser("doctor", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML of a `minillm` run to check, with a memory estimate")
    parser.add_argument(
        "--prompt_tokens", type=int, default=256, help="length of the longest prompt, for the estimate"
    )
    return parser


def run(argv: list[str]) -> int:
    """Print the screen; 0 if nothing stands against the configuration (without one, against any run), else 1."""
    options = parse_plain(build_parser(), argv)
    if options.config is not None and not Path(options.config).is_file():
        raise UserError(f"--config {options.config}: no such file.")
    from ..hardware.machine import probe, problems

    machine = probe()
    print("\n".join(describe(machine)))
    found, strategy = problems(machine), "ddp"
    if options.config is not None:
        try:
            settings = _read(options.config)
        except UserError as error:  # some settings are refused by TrainingArguments where there is no GPU for them
            found.append(str(error))
        else:
            found = check(machine, *settings) + check_pair(*settings)
            strategy, parts = choose_strategy(machine, *settings, prompt_tokens=options.prompt_tokens)
            print("\n" + "\n".join(describe_memory(machine, strategy, parts)))
            print("\n" + "\n".join(describe_ends(*settings)))
    print("\n" + f"Launch with\n  {launch_line(machine, options.config, strategy)}")
    print("\n" + ("\n".join(f"PROBLEM  {each}" for each in found) or "Nothing found that stands against it."))
    return 1 if found else 0


def describe(machine: "Machine") -> list[str]:
    """The machine in lines for the screen."""
    from ..hardware.machine import best_precision

    lines = [f"CPU       {machine.cores} cores, {machine.memory / _GIB:.0f} GiB"]
    for gpu in machine.gpus or ():
        lines.append(f"GPU       {gpu.name}, {gpu.architecture}, {gpu.memory / _GIB:.0f} GiB")
    if not machine.gpus:
        lines.append("GPU       none that torch can use")
    build = "a build for CPUs" if machine.cuda is None else f"CUDA {machine.cuda}: {', '.join(machine.architectures)}"
    lines.append(f"torch     {machine.versions['torch']}, {build}")
    for name, installed in machine.versions.items():
        if name == "torch":
            continue
        tested = "" if name != "trl" else f", tested with {', '.join(TESTED)}"
        lines.append(f"{name:<13} {installed or 'not installed'}{tested if installed else ''}")
    precision = best_precision(machine)
    lines.append(f"precision to train in: {'float32' if precision == 'no' else precision}")
    if machine.gpus:
        oldest = min(gpu.capability for gpu in machine.gpus)
        able = {"FlashAttention-2": oldest >= (8, 0), "LLM.int8()": oldest >= (7, 5), "NF4": oldest >= (6, 0)}
        lines.append("          " + ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in able.items()))
    return lines


def check(machine: "Machine", model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig") -> list[str]:
    """What stands against the settings of a run on a machine."""
    from ..hardware.machine import problems

    return problems(
        machine,
        bf16=args.bf16,
        fp16=args.fp16,
        attn_implementation=model.attn_implementation,
        load_in_8bit=model.load_in_8bit,
        use_cpu=args.use_cpu,
        compile_rollouts=args.compile_rollouts,
    ) + problems(
        machine,
        attn_implementation=(args.teacher_model_init_kwargs or {}).get("attn_implementation"),
        load_in_8bit=quantization_settings(args.teacher_model_init_kwargs).get("load_in_8bit", False),
        use_cpu=args.use_cpu,
    )


def check_pair(model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig") -> list[str]:
    """What stands against a student and a teacher: pickled weights, other tokenizers, a context without room."""
    from ..models.loading import check_room, load_tokenizer
    from ..models.pickled_weights import refuse_pickled_weights
    from ..models.teacher import check_same_tokenizer

    names, found = [model.model_name_or_path, teacher.teacher_model_name_or_path], []
    revisions = model.model_revision, (args.teacher_model_init_kwargs or {}).get("revision")
    student_kwargs = {"revision": model.model_revision, **(args.model_init_kwargs or {})}
    try:
        if not args.allow_pickled_weights:
            for name, init_kwargs in zip(names, (student_kwargs, args.teacher_model_init_kwargs), strict=True):
                refuse_pickled_weights(name, init_kwargs)
        tokenizers = [load_tokenizer(*each, args.trust_remote_code) for each in zip(names, revisions, strict=True)]
        check_same_tokenizer(*tokenizers)
        check_room(
            names, [], tokenizers[0], "max_completion_length", args.max_completion_length, args.trust_remote_code
        )
        if read_settings(Path(model.model_name_or_path)) is not None:
            found.append(
                f"the student {model.model_name_or_path} comes straight from `minillm-trl shrink`. Heal it first with "
                "`minillm-trl kd` or `seqkd`: its own samples are not yet text that a teacher can correct."
            )
    except UserError as error:
        found.append(str(error))
    return found


def describe_ends(model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig") -> list[str]:
    """What ends completions, in lines for the screen; none where a tokenizer cannot be read."""
    from ..models.end_tokens import check_eos, find_end_tokens, read_generation_config
    from ..models.loading import generation_source, load_tokenizer

    revisions = model.model_revision, (args.teacher_model_init_kwargs or {}).get("revision")
    names = model.model_name_or_path, teacher.teacher_model_name_or_path
    lines = {}
    try:
        tokenizers = [load_tokenizer(*each, args.trust_remote_code) for each in zip(names, revisions, strict=True)]
        configs = [
            read_generation_config(*generation_source(*each), args.trust_remote_code)
            for each in zip(names, revisions, strict=True)
        ]
        for conversational in (False, True) if tokenizers[0].chat_template is not None else (False,):
            ends = find_end_tokens(
                tokenizers[0],
                conversational=conversational,
                student=configs[0],
                teacher=configs[1],
                teacher_tokenizer=tokenizers[1],
                eos_tokens=args.eos_tokens,
                chat_template_kwargs=args.chat_template_kwargs,
            )
            check_eos(tokenizers[0], ends)
            kind = "Conversations" if conversational else "Texts"
            lines |= dict.fromkeys([f"{kind} end with {ends.describe(tokenizers[0])}", *ends.doubts])
    except ValueError as error:
        lines[str(error)] = None
    return list(lines)


def choose_strategy(
    machine: "Machine", model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig", prompt_tokens: int
) -> tuple[str, dict[str, float]]:
    """How to spread the student over the GPUs, with the least communication that fits; and the estimate for it."""
    from ..hardware.memory_estimate import Workload, estimate_memory
    from ..models.loading import load_config

    names = model.model_name_or_path, teacher.teacher_model_name_or_path
    configs = [load_config(name, args.trust_remote_code) for name in names]
    buffered = args.per_device_train_batch_size * args.steps_per_generation
    teacher_kwargs: dict[str, Any] = args.teacher_model_init_kwargs or {}
    dtype = (args.model_init_kwargs or {}).get("dtype", model.dtype)
    dtype = configs[0].dtype if dtype == "auto" else dtype
    load = Workload(
        rows=args.per_device_train_batch_size,
        sampled_rows=args.sampling_batch_size or buffered,
        buffered_rows=buffered,
        prompt_tokens=prompt_tokens,
        completion_tokens=args.max_completion_length,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_rank=model.lora_r if model.use_peft else None,
        base_in_float32=str(dtype).removeprefix("torch.") in ("float32", "None"),
        student_4bit=model.load_in_4bit,
        teacher_4bit=quantization_settings(teacher_kwargs).get("load_in_4bit", False),
        keeps_states=args.teacher_hidden_states == "device",
        keeps_teacher=not args.offload_teacher,
        processes=max(len(machine.gpus), 1),
        shard_teacher=args.shard_teacher,
        teacher_shares_base=args.teacher_shares_base,
        mixed_precision=bool(machine.gpus or args.bf16 or args.fp16),
        half_precision_rollouts=bool(machine.gpus or args.half_precision_rollouts),
    )
    strategies = ["ddp"]
    if len(machine.gpus) > 1:
        able = {"zero2": bool(machine.versions.get("deepspeed")), "fsdp": not load.student_4bit}
        strategies += [name for name, is_able in able.items() if is_able and not args.teacher_shares_base]
    estimates = {name: estimate_memory(*configs, replace(load, strategy=name)) for name in strategies}
    smallest = min((gpu.memory for gpu in machine.gpus), default=math.inf)
    fitting = [name for name, parts in estimates.items() if _MARGIN * _peak(parts) < smallest]
    chosen = fitting[0] if fitting else min(strategies, key=lambda name: _peak(estimates[name]))
    return chosen, estimates[chosen]


def describe_memory(machine: "Machine", strategy: str, parts: dict[str, float]) -> list[str]:
    """The memory estimate in lines, beside what the smallest GPU has, or without a GPU the machine."""
    place = f"each GPU in mixed precision under {strategy}" if machine.gpus else "the process on this CPU"
    lines = [f"Memory of {place}, an estimate:"]
    lines += [f"  {value / _GIB:7.2f} GiB  {name}" for name, value in parts.items()]
    smallest = min((gpu.memory for gpu in machine.gpus), default=machine.memory)
    fits = "fits" if _MARGIN * _peak(parts) < smallest else "may not fit"
    verdict = fits if _peak(parts) < smallest else "does not fit"
    lines.append(f"  {smallest / _GIB:7.2f} GiB  is there: {verdict}")
    if verdict != "fits":
        lines.append(f"  To save memory: {_SAVINGS['GPU' if machine.gpus else 'CPU']}")
    return lines


def launch_line(machine: "Machine", config: str | None, strategy: str = "ddp") -> str:
    """The command that starts a run with all GPUs of a machine."""
    from ..hardware.machine import best_precision

    number, precision = len(machine.gpus), best_precision(machine)
    name = {0: "cpu", 1: "single_gpu"}.get(number, strategy)
    if number > 1 or precision == "fp16":
        name = f"{'v100_' if precision == 'fp16' else ''}{name}_{precision}"
    processes = f" --num_processes {number}" if number > 1 else ""
    return f"minillm-trl minillm --config {config or 'FILE.yaml'} --accelerate_config {name}{processes}"


def _peak(parts: dict[str, float]) -> float:
    return max(parts["while sampling"], parts["while updating"])


def _read(path: str) -> "tuple[ModelConfig, TeacherArguments, MiniLLMConfig]":
    from . import minillm

    with contextlib.redirect_stdout(io.StringIO()):  # parsing may announce devices
        (_, teacher, *_, args, model), _ = parse(minillm.build_parser(), ["--config", path])
    return model, teacher, args
