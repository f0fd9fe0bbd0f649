"""What a machine has, and what it can run: facts apart from verdicts, so that verdicts can be tested anywhere."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
)

_INSTALL_TORCH = "pip install 'torch>=2.13,<2.15' --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class GPU:
    """A CUDA device: its name, compute capability and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Machine:
    """Facts about a machine.

    Attributes:
        gpus (`tuple[GPU, ...]`): CUDA devices that this process can use.
        cores (`int`): CPU cores.
        memory (`int`): of the CPU, in bytes.
        cuda (`str`, *optional*): version of CUDA that torch was built for; None for a CPU build.
        architectures (`tuple[str, ...]`): what torch was built for, as in `sm_70`.
        versions (`Mapping[str, str | None]`): of the packages that matter; None where one is not installed.
    """

    gpus: tuple[GPU, ...]
    cores: int
    memory: int
    cuda: str | None
    architectures: tuple[str, ...]
    versions: Mapping[str, str | None]


def probe() -> Machine:
    """The facts about this machine."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(GPU(properties.name, (properties.major, properties.minor), properties.total_memory))
    return Machine(
        gpus=tuple(gpus),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if gpus else (),
        versions={name: _version(name) for name in _PACKAGES},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def best_precision(machine: Machine) -> str:
    """Mixed precision to train in: `"bf16"` where every GPU has it (compute capability 8.0), `"fp16"` on others,
    `"no"` without a GPU."""
    if not machine.gpus:
        return "no"
    return "bf16" if all(gpu.capability >= (8, 0) for gpu in machine.gpus) else "fp16"


def runs_on(gpu: GPU, architectures: tuple[str, ...]) -> bool:
    """Whether code built for `architectures` runs on a GPU: the same major version and no newer minor one, or any
    older PTX (`compute_XY`), which the driver translates."""
    for each in architectures:
        kind, _, number = each.partition("_")
        number = number.rstrip("abcdefghijklmnopqrstuvwxyz")  # sm_90a
        built = (int(number[:-1]), int(number[-1]))
        if kind == "sm" and built[0] == gpu.capability[0] and built[1] <= gpu.capability[1]:
            return True
        if kind == "compute" and built <= gpu.capability:
            return True
    return False


def problems(
    machine: Machine,
    *,
    bf16: bool = False,
    fp16: bool = False,
    attn_implementation: str | None = None,
    load_in_8bit: bool = False,
    use_cpu: bool = False,
    compile_rollouts: str | None = None,
) -> list[str]:
    """Why settings cannot run on a machine; each names the setting, its value and what to set instead.

    Args:
        machine ([`Machine`]): its facts.
        bf16, fp16, use_cpu (`bool`): as in [`MiniLLMConfig`].
        attn_implementation (`str`, *optional*): of student or teacher.
        load_in_8bit (`bool`): whether a model is loaded by LLM.int8().
        compile_rollouts (`str`, *optional*): as in [`MiniLLMConfig`].

    Returns:
        `list[str]`: empty where nothing stands against them.
    """
    found = []
    if use_cpu or not machine.gpus:
        if fp16:
            found.append("fp16=True has no gradient scaler on a CPU: set fp16=False (float32), or bf16=True.")
        if not use_cpu and machine.cuda is None and (bf16 or fp16):
            found.append(
                f"torch {machine.versions['torch']} is a build for CPUs, so no GPU can be used. On a machine with a "
                f"GPU install another: {_INSTALL_TORCH}; otherwise set use_cpu=True."
            )
        return found
    oldest = min(machine.gpus, key=lambda gpu: gpu.capability)
    place = f"{oldest.name} ({oldest.architecture})"
    if not runs_on(oldest, machine.architectures):
        found.append(
            f"torch {machine.versions['torch']} was not built for the {place}, only for "
            f"{', '.join(machine.architectures)}. The builds for CUDA 12.6 have it up to torch 2.14: {_INSTALL_TORCH}"
        )
    if bf16 and oldest.capability < (8, 0):
        found.append(f"bf16=True: the {place} has no bfloat16. Set bf16=False and fp16=True.")
    if attn_implementation in ("flash_attention_2", "kernels-community/flash-attn2") and oldest.capability < (8, 0):
        found.append(
            f"attn_implementation={attn_implementation!r}: FlashAttention-2 needs compute capability 8.0, which the "
            f"{place} is below. Set attn_implementation='sdpa'."
        )
    if load_in_8bit and oldest.capability < (7, 5):
        found.append(
            f"load_in_8bit=True: LLM.int8() needs compute capability 7.5, which the {place} is below. Set "
            "load_in_4bit=True with bnb_4bit_quant_type='nf4' and bnb_4bit_compute_dtype='float16'."
        )
    if compile_rollouts == "inductor" and oldest.capability < (7, 0):
        found.append(
            f"compile_rollouts='inductor': Triton needs compute capability 7.0, which the {place} is below. Set "
            "compile_rollouts='cudagraphs'."
        )
    return found
