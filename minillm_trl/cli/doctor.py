"""`minillm-trl doctor`: show the machine, check a configuration on it, and print the launch command."""

import argparse
import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trl import ModelConfig

from ..errors import UserError
from ..models.init_kwargs import parsed_kwargs
from ..models.weight_formats import quantization_settings
from ..teacher_server.addresses import served_names
from ..training.trl_version import TESTED
from .arguments import PlainParser, TeacherArguments, parse, parse_plain
from .shrink import read_settings

# Functions import torch, transformers and TRL's configurations, which take seconds, so that `--help` is quick.
if TYPE_CHECKING:
    from ..config import MiniLLMConfig
    from ..hardware.machine import Machine

_GIB = 2**30
_MARGIN = 1.2  # for framework overhead and fragmentation
_SAVINGS = {
    "GPU": "shard_teacher, offload_teacher or a 4-bit teacher; teacher_hidden_states: cpu; a smaller "
    "per_device_train_batch_size or sampling_batch_size; an adapter (use_peft), its base in 4 bits or, by dtype, in "
    "half precision.",
    "CPU": "a smaller per_device_train_batch_size or sampling_batch_size; an adapter (use_peft); bf16.",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser("doctor", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML of a `minillm` run to check, with a memory estimate")
    parser.add_argument(
        "--prompt_tokens", type=int, default=256, help="length of the longest prompt, for the estimate"
    )
    return parser


def run(argv: list[str]) -> int:
    """Print the report; return 1 if it lists problems of the configuration (without one: of the machine), else 0."""
    options = parse_plain(build_parser(), argv)
    if options.config is not None and not Path(options.config).is_file():
        raise UserError(f"--config {options.config}: no such file.")
    from ..hardware.machine import probe, problems

    machine = probe()
    print("\n".join(describe(machine)))
    found, strategy, processes = problems(machine), "ddp", len(machine.gpus)
    if options.config is not None:
        try:
            teachers = _read(options.config)
        except UserError as error:  # TrainingArguments refuses some settings on a machine without a GPU
            found.append(str(error))
        else:
            settings = next(iter(teachers.values()))
            processes = training_processes(machine, settings[2].rollout_device)
            found = check(machine, *settings)
            for name, pair in teachers.items():
                found += [problem if name is None else f"Teacher {name!r}: {problem}" for problem in check_pair(*pair)]
            estimates = [
                choose_strategy(machine, *pair, prompt_tokens=options.prompt_tokens) for pair in teachers.values()
            ]
            strategy, parts = with_all_teachers(estimates, offloads=settings[2].offload_teacher)
            print("\n" + "\n".join(describe_memory(machine, strategy, parts)))
            print("\n" + "\n".join(describe_ends(*settings)))
    print("\n" + f"Launch with\n  {launch_line(machine, options.config, strategy, processes)}")
    print("\n" + ("\n".join(f"PROBLEM  {problem}" for problem in found) or "No problems found."))
    return 1 if found else 0


def describe(machine: "Machine") -> list[str]:
    """Return a description of the machine, line by line."""
    from ..hardware.machine import best_precision

    lines = [f"CPU       {machine.cores} cores, {machine.memory / _GIB:.0f} GiB"]
    for gpu in machine.gpus or ():
        lines.append(f"GPU       {gpu.name}, {gpu.architecture}, {gpu.memory / _GIB:.0f} GiB")
    if not machine.gpus:
        lines.append("GPU       torch can use no GPU")
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
    """Return why the settings of a run cannot work on a machine; empty if they can."""
    from ..hardware.machine import problems

    teacher_kwargs = parsed_kwargs(args.teacher_model_init_kwargs)
    of_student = problems(
        machine,
        bf16=bool(args.bf16),
        fp16=args.fp16,
        attn_implementation=model.attn_implementation,
        load_in_8bit=model.load_in_8bit,
        use_cpu=args.use_cpu,
        compile_rollouts=args.compile_rollouts,
    )
    of_teacher = problems(
        machine,
        attn_implementation=(teacher_kwargs or {}).get("attn_implementation"),
        load_in_8bit=quantization_settings(teacher_kwargs).get("load_in_8bit", False),
        use_cpu=args.use_cpu,
    )
    return of_student + of_teacher + _problems_of_rollout_device(model, args)


def _problems_of_rollout_device(model: ModelConfig, args: "MiniLLMConfig") -> list[str]:
    from ..training.rollout_device import rollout_device

    name = args.rollout_device
    found = [
        f"rollout_device={name!r} needs a copy of the student, which {option}=True quantises. Drop one of them."
        for option in ("load_in_4bit", "load_in_8bit")
        if name is not None and getattr(model, option)
    ]
    try:
        rollout_device(args)
    except UserError as error:
        found.append(str(error))
    return found


def check_pair(model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig") -> list[str]:
    """Return problems of student and teacher: pickled weights, different tokenizers, a context that is too short."""
    from ..models.loading import check_room, load_tokenizer
    from ..models.pickled_weights import refuse_pickled_weights
    from ..models.teacher import check_same_tokenizer
    from ..rollouts.cross_tokenizer import check_two_tokenizers

    sources, found = _sources(model, teacher, args), []
    names = [name for name, _ in sources]
    student_kwargs = {"revision": model.model_revision, **(parsed_kwargs(args.model_init_kwargs) or {})}
    teacher_kwargs = parsed_kwargs(args.teacher_model_init_kwargs)
    assert args.max_completion_length is not None  # MiniLLMConfig refuses None
    try:
        if not args.allow_pickled_weights:
            for name, init_kwargs in zip(names, (student_kwargs, teacher_kwargs), strict=True):
                refuse_pickled_weights(name, init_kwargs)
        tokenizers = [load_tokenizer(*source, args.trust_remote_code) for source in sources]
        if args.cross_tokenizer:
            check_two_tokenizers(tokenizers[0], tokenizers[1], conversational=False)
        else:
            check_same_tokenizer(tokenizers[0], tokenizers[1])
        readers = names[:1] if args.cross_tokenizer else names  # of the student's tokens
        check_room(
            readers, [], tokenizers[0], "max_completion_length", args.max_completion_length, args.trust_remote_code
        )
        if read_settings(Path(names[0])) is not None:
            found.append(
                f"the student {model.model_name_or_path} comes straight from `minillm-trl shrink`, so its samples are "
                "not yet text that a teacher can correct. Train it on the teacher's answers first: `minillm-trl kd`, "
                "with --kd_ratio 1."
            )
    except UserError as error:
        found.append(str(error))
    return found


def describe_ends(model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig") -> list[str]:
    """Return the tokens that end completions, line by line, or the error if a tokenizer cannot be read."""
    from ..models.end_tokens import check_eos, find_end_tokens, read_generation_config
    from ..models.loading import generation_source, load_tokenizer

    sources = _sources(model, teacher, args)
    lines: dict[str, None] = {}  # an ordered set
    try:
        tokenizers = [load_tokenizer(*source, args.trust_remote_code) for source in sources]
        configs = [read_generation_config(*generation_source(*source), args.trust_remote_code) for source in sources]
        for conversational in (False, True) if tokenizers[0].chat_template is not None else (False,):
            ends = find_end_tokens(
                tokenizers[0],
                conversational=conversational,
                student=configs[0],
                teacher=configs[1],
                teacher_tokenizer=tokenizers[1],
                eos_tokens=args.eos_tokens,
                chat_template_kwargs=parsed_kwargs(args.chat_template_kwargs),
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
    """Choose the strategy with the least communication that fits the GPUs; return it with its memory estimate."""
    from ..hardware.memory_estimate import Workload, estimate_memory
    from ..models.loading import load_config
    from ..models.packed_weights import packs_weights

    configs = [load_config(name, args.trust_remote_code) for name, _ in _sources(model, teacher, args)]
    assert args.steps_per_generation is not None  # set by GRPOConfig
    assert args.max_completion_length is not None  # MiniLLMConfig refuses None
    buffered = args.per_device_train_batch_size * args.steps_per_generation
    teacher_kwargs = parsed_kwargs(args.teacher_model_init_kwargs)
    dtype = (parsed_kwargs(args.model_init_kwargs) or {}).get("dtype", model.dtype)
    dtype = configs[0].dtype if dtype == "auto" else dtype
    samples_with_vllm = args.use_vllm and args.teacher_mixed_alpha == 0.0  # with mixing, vLLM only drafts
    decodes = not (samples_with_vllm or args.reshaping_fields())
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
        processes=max(training_processes(machine, args.rollout_device), 1),
        shard_teacher=args.shard_teacher,
        teacher_shares_base=args.teacher_shares_base,
        mixed_precision=bool(machine.gpus or args.bf16 or args.fp16),
        half_precision_rollouts=bool(machine.gpus or args.half_precision_rollouts),
        merged_rollouts=args.merged_rollouts is not False and decodes,
        packs_weights=not machine.gpus and packs_weights(),
        teacher_samples=args.teacher_mixed_alpha > 0.0,
        compiles=decodes and args.compile_rollouts not in (None, *([] if machine.gpus else ["auto"])),
        overlaps=args.overlap_rollouts,
        rollout_device=args.rollout_device,
    )
    strategies = ["ddp"]
    if load.processes > 1 and not args.overlap_rollouts:
        able = {"zero2": bool(machine.versions.get("deepspeed")), "fsdp": not load.student_4bit}
        strategies += [name for name, is_able in able.items() if is_able and not args.teacher_shares_base]
    estimates = {name: estimate_memory(configs[0], configs[1], replace(load, strategy=name)) for name in strategies}
    smallest = min((gpu.memory for gpu in machine.gpus), default=math.inf)
    fitting = [name for name, parts in estimates.items() if _MARGIN * _peak(parts) < smallest]
    chosen = fitting[0] if fitting else min(strategies, key=lambda name: _peak(estimates[name]))
    return chosen, estimates[chosen]


def with_all_teachers(
    estimates: Sequence[tuple[str, dict[str, float]]], offloads: bool
) -> tuple[str, dict[str, float]]:
    """Return the estimate with the largest of several teachers, and the weights of the others added to it.

    Args:
        estimates (`Sequence[tuple[str, dict]]`): strategy and estimate with each teacher alone.
        offloads (`bool`): whether the device holds one of them at a time.
    """
    ordered = sorted(estimates, key=lambda estimate: -estimate[1]["teacher"])
    (strategy, parts), *others = ordered
    added = 0.0 if offloads else sum(other["teacher"] for _, other in others)
    phases = ("teacher", *(_of_rollout_device(parts) or ["while sampling", "while updating"]))
    return strategy, {name: value + (added if name in phases else 0.0) for name, value in parts.items()}


def describe_memory(machine: "Machine", strategy: str, parts: dict[str, float]) -> list[str]:
    """Return the memory estimate, line by line, compared with the smallest GPU or, without one, the machine."""
    place = f"each GPU in mixed precision under {strategy}" if machine.gpus else "the process on this CPU"
    lines = [f"Memory of {place}, an estimate:"]
    lines += [f"  {value / _GIB:7.2f} GiB  {name}" for name, value in parts.items()]
    smallest = min((gpu.memory for gpu in machine.gpus), default=machine.memory)
    fits = "fits" if _MARGIN * _peak(parts) < smallest else "may not fit"
    verdict = fits if _peak(parts) < smallest else "does not fit"
    lines.append(f"  {smallest / _GIB:7.2f} GiB  available: {verdict}")
    if verdict != "fits":
        lines.append(f"  To save memory: {_SAVINGS['GPU' if machine.gpus else 'CPU']}")
    return lines


def training_processes(machine: "Machine", rollout_device: str | None) -> int:
    """Return the number of GPUs of a machine that train: with a `rollout_device`, each has one that samples."""
    import torch

    number = len(machine.gpus)
    device = None if rollout_device is None else torch.device(rollout_device)
    if device is None or device.type != "cuda" or device.index is None:
        return number
    return min(max(min(device.index, number - device.index), 1), number)


def launch_line(machine: "Machine", config: str | None, strategy: str = "ddp", processes: int | None = None) -> str:
    """Return the command that starts a run on a machine, with a process for each GPU that trains, by default all."""
    from ..hardware.machine import best_precision

    number, precision = len(machine.gpus) if processes is None else processes, best_precision(machine)
    name = {0: "cpu", 1: "single_gpu"}.get(number, strategy)
    if number > 1 or precision == "fp16":
        name = f"{'v100_' if precision == 'fp16' else ''}{name}_{precision}"
    of_launcher = f" --num_processes {number}" if number > 1 else ""
    return f"minillm-trl minillm --config {config or 'FILE.yaml'} --accelerate_config {name}{of_launcher}"


def _sources(model: ModelConfig, teacher: TeacherArguments, args: "MiniLLMConfig") -> list[tuple[str, str | None]]:
    """Return name or folder, and revision, of student and teacher."""
    assert model.model_name_or_path is not None  # the parser requires it
    teacher_kwargs = parsed_kwargs(args.teacher_model_init_kwargs) or {}
    return [
        (model.model_name_or_path, model.model_revision),
        (teacher.teacher_model_name_or_path, teacher_kwargs.get("revision")),
    ]


def _peak(parts: dict[str, float]) -> float:
    others = [name for name in _of_rollout_device(parts) if not name.startswith("on cpu")]
    return max(parts[name] for name in ("while sampling", "while updating", *others))


def _of_rollout_device(parts: dict[str, float]) -> list[str]:
    """Return the name of the sum over what is on `rollout_device`, if there is one."""
    return [name for name in parts if name.startswith("on ")]


def _read(path: str) -> "dict[str | None, tuple[ModelConfig, TeacherArguments, MiniLLMConfig]]":
    """Return the settings of a run with each of its teachers, by name; the only one of a run has the name None."""
    from . import minillm

    with contextlib.redirect_stdout(io.StringIO()):  # parsing may announce devices
        (_, _, teacher, *_, args, model), _ = parse(minillm.build_parser(), ["--config", path])
    teacher.check(args)
    if args.teacher_server_url is not None or args.offline_teacher is not None or served_names(args):
        raise UserError(
            f"{path}: doctor cannot check a teacher on a server (teacher_server_url, teachers) or stored scores "
            "(offline_teacher). Start the training, which compares tokenizer and model with the student before its "
            "first step."
        )
    return {name: (model, TeacherArguments(folder), args) for name, folder in teacher.local(args).items()}
