"""`minillm-trl doctor`: what this machine has, whether a configuration can run on it, and how to start it."""

import argparse
import contextlib
import io
from typing import Any

from transformers import AutoConfig
from trl import ModelConfig

from ..config import MiniLLMConfig
from ..hardware import Machine, best_precision, probe, problems
from ..memory_estimate import Workload, estimate_memory
from ..trl_version import TESTED
from .arguments import parse, parse_plain
from .minillm import TeacherArguments, build_parser

_GIB = 2**30


def run(argv: list[str]) -> int:
    """Print the screen; 0 if nothing stands against the configuration (without one, against any run), else 1."""
    parser = argparse.ArgumentParser("minillm-trl doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML of a `minillm` run to check, with a memory estimate")
    parser.add_argument(
        "--prompt_tokens", type=int, default=256, help="length of the longest prompt, for the estimate"
    )
    options = parse_plain(parser, argv)
    machine = probe()
    print("\n".join(describe(machine)))
    found = problems(machine)
    if options.config is not None:
        try:
            settings = _read(options.config)
        except ValueError as error:  # some settings are refused by TrainingArguments where there is no GPU for them
            found.append(str(error))
        else:
            found = check(machine, *settings)
            print("\n" + "\n".join(describe_memory(machine, *settings, prompt_tokens=options.prompt_tokens)))
    print("\n" + f"Launch with\n  {launch_line(machine, options.config)}")
    print("\n" + ("\n".join(f"PROBLEM  {each}" for each in found) or "Nothing found that stands against it."))
    return 1 if found else 0


def describe(machine: Machine) -> list[str]:
    """The machine in lines for the screen."""
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
    lines.append(f"precision to train in: {best_precision(machine)}")
    if machine.gpus:
        oldest = min(gpu.capability for gpu in machine.gpus)
        able = {"FlashAttention-2": oldest >= (8, 0), "LLM.int8()": oldest >= (7, 5), "NF4": oldest >= (6, 0)}
        lines.append("          " + ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in able.items()))
    return lines


def check(machine: Machine, model: ModelConfig, teacher: TeacherArguments, args: MiniLLMConfig) -> list[str]:
    """What stands against the settings of a run on a machine."""
    return problems(
        machine,
        bf16=args.bf16,
        fp16=args.fp16,
        attn_implementation=model.attn_implementation,
        load_in_8bit=model.load_in_8bit,
        use_cpu=args.use_cpu,
        compile_rollouts=args.compile_rollouts,
    )


def describe_memory(
    machine: Machine, model: ModelConfig, teacher: TeacherArguments, args: MiniLLMConfig, prompt_tokens: int
) -> list[str]:
    """The memory estimate in lines, beside what the smallest GPU has."""
    names = model.model_name_or_path, teacher.teacher_model_name_or_path
    configs = [AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code) for name in names]
    buffered = args.per_device_train_batch_size * args.steps_per_generation
    teacher_kwargs: dict[str, Any] = args.teacher_model_init_kwargs or {}
    parts = estimate_memory(
        *configs,
        Workload(
            rows=args.per_device_train_batch_size,
            sampled_rows=args.sampling_batch_size or buffered,
            buffered_rows=buffered,
            prompt_tokens=prompt_tokens,
            completion_tokens=args.max_completion_length,
            gradient_checkpointing=args.gradient_checkpointing,
            lora_rank=model.lora_r if model.use_peft else None,
            student_4bit=model.load_in_4bit,
            teacher_4bit="quantization_config" in teacher_kwargs,
            keeps_states=args.teacher_hidden_states == "device",
            keeps_teacher=not args.offload_teacher,
        ),
    )
    lines = ["Memory of each process in mixed precision, an estimate not compared with a GPU yet; leave a fifth:"]
    lines += [f"  {value / _GIB:7.2f} GiB  {name}" for name, value in parts.items()]
    if machine.gpus:
        smallest = min(gpu.memory for gpu in machine.gpus)
        most = max(parts["while sampling"], parts["while updating"])
        verdict = "fits" if 1.2 * most < smallest else "may not fit" if most < smallest else "does not fit"
        lines.append(f"  {smallest / _GIB:7.2f} GiB  is there: {verdict}")
    return lines


def launch_line(machine: Machine, config: str | None) -> str:
    """The command that starts a run with all GPUs of a machine."""
    number = len(machine.gpus)
    name = {0: "cpu", 1: "single_gpu"}.get(number)
    if name is None:
        name = "ddp_bf16" if best_precision(machine) == "bf16" else "v100_ddp_fp16"
    processes = f" --num_processes {number}" if number > 1 else ""
    return f"minillm-trl minillm --config {config or 'FILE.yaml'} --accelerate_config {name}{processes}"


def _read(path: str) -> tuple[ModelConfig, TeacherArguments, MiniLLMConfig]:
    with contextlib.redirect_stdout(io.StringIO()):  # parsing may announce devices
        (_, teacher, _, args, model), _ = parse(build_parser(), ["--config", path])
    return model, teacher, args
