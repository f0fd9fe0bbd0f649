"""Facts about a machine, and the settings that it cannot run.

Facts are plain values, so that the verdict on any machine can be tested on every other one.
"""

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
        memory (`int`): CPU memory, in bytes.
        cuda (`str`, *optional*): CUDA version that torch was built for; None for a CPU build.
        architectures (`tuple[str, ...]`): GPU architectures that torch was built for, such as `sm_70`.
        versions (`Mapping[str, str | None]`): versions of the packages that matter; None for a missing package.
    """

    gpus: tuple[GPU, ...]
    cores: int
    memory: int
    cuda: str | None
    architectures: tuple[str, ...]
    versions: Mapping[str, str | None]


def probe() -> Machine:
    """Return the facts about this machine."""
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
    """Return the mixed precision to train in.

    `"bf16"` if every GPU supports it (compute capability 8.0), `"fp16"` on older GPUs, `"no"` without a GPU.
    """
    if not machine.gpus:
        return "no"
    return "bf16" if all(gpu.capability >= (8, 0) for gpu in machine.gpus) else "fp16"


def runs_on(gpu: GPU, architectures: tuple[str, ...]) -> bool:
    """Return whether code built for `architectures` runs on a GPU.

    Machine code (`sm_XY`) runs on GPUs of the same major version and the same or a newer minor version. The driver
    translates PTX (`compute_XY`) for every newer GPU.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
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
    """List the settings that cannot run on a machine, with their values and what to set instead.

    Args:
        machine ([`Machine`]): facts from [`probe`].
        bf16, fp16, use_cpu (`bool`): as in [`MiniLLMConfig`].
        attn_implementation (`str`, *optional*): attention of student or teacher.
        load_in_8bit (`bool`): whether a model is loaded with LLM.int8().
        compile_rollouts (`str`, *optional*): as in [`MiniLLMConfig`].

    Returns:
        `list[str]`: one message for each problem; empty if there is none.
    """
    if use_cpu or not machine.gpus:
        return _problems_on_cpu(machine, bf16=bf16, fp16=fp16, use_cpu=use_cpu)
    found = []
    # Every process runs the same settings, so the oldest GPU decides
    oldest = min(machine.gpus, key=lambda gpu: gpu.capability)
    place = f"{oldest.name} ({oldest.architecture})"
    if not runs_on(oldest, machine.architectures):
        found.append(
            f"torch {machine.versions['torch']} was not built for the {place}, only for "
            f"{', '.join(machine.architectures)}. Builds for CUDA 12.6 support it up to torch 2.14: {_INSTALL_TORCH}"
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


def _problems_on_cpu(machine: Machine, *, bf16: bool, fp16: bool, use_cpu: bool) -> list[str]:
    found = []
    if fp16:
        found.append("fp16=True has no gradient scaler on a CPU: set fp16=False (float32), or bf16=True.")
    if not use_cpu and machine.cuda is None and (bf16 or fp16):
        found.append(
            f"torch {machine.versions['torch']} is a CPU build, which cannot use a GPU. On a machine with a GPU "
            f"install a CUDA build: {_INSTALL_TORCH}; otherwise set use_cpu=True."
        )
    return found
