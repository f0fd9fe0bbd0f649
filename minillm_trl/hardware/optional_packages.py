"""Check for packages that only some options need, before any work starts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..errors import MissingPackageError, UserError
from ..models.weight_formats import quantization_settings

# For each integration: modules, one of which must be installed, and what to install
_REPORTERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),  # a service that the environment names, not a package
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}

# Prefix of the optimizer's name, module, and what to install; the first match counts. All other optimizers are part
# of torch or transformers.
_OPTIMIZERS: tuple[tuple[str, str, str], ...] = (
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("adamw_torch_8bit", "torchao", "torchao"),
    ("adamw_anyprecision", "torchdistx", "torchdistx"),
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("adalomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    *((name, "bitsandbytes", "bitsandbytes") for name in ("adamw_bnb", "adamw_8bit", "rmsprop_bnb", "lion", "paged")),
    ("ademamix", "bitsandbytes", "bitsandbytes"),
)


@dataclass(frozen=True)
class _Need:
    """A package that an option needs.

    Attributes:
        option (`str`): the option with its value.
        modules (`tuple[str, ...]`): modules, one of which must be installed.
        install (`str`): arguments of `pip install`.
        instead (`str`): a setting that needs no package.
    """

    option: str
    modules: tuple[str, ...]
    install: str
    instead: str


def check_packages(settings: Mapping[str, Any]) -> None:
    """Check that the optional packages that settings need are installed, without importing them.

    Args:
        settings (`Mapping`): values by name: fields of `TrainingArguments` and TRL's `ModelConfig`, and
            `teacher_model_init_kwargs`; other names are ignored.

    Raises:
        MissingPackageError: naming the option, its value, the package, and how to install it.
        ValueError: for a `report_to` that transformers does not know.
    """
    for need in _needs(settings):
        if not any(find_spec(module) is not None for module in need.modules):
            raise MissingPackageError(
                f"{need.option} needs the package {need.modules[0]}, which is not installed: pip install "
                f"{need.install}. Or set {need.instead}."
            )


def _needs(settings: Mapping[str, Any]) -> Iterator[_Need]:
    yield from _reporters(settings.get("report_to"))
    yield from _optimizer(settings.get("optim"))
    if settings.get("use_vllm"):
        yield _Need("use_vllm=True", ("vllm",), "'minillm-trl[vllm]'", "use_vllm=False")
    if settings.get("teacher_server_url"):
        yield _Need("teacher_server_url", ("aiohttp",), "'minillm-trl[server]'", "teacher_model_name_or_path")
    if settings.get("use_liger_kernel"):
        yield _Need("use_liger_kernel=True", ("liger_kernel",), "liger-kernel", "use_liger_kernel=False")
    yield from _model("", settings)
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        kwargs = settings.get(name) or {}
        yield from _model(f"{name}: ", kwargs)
        yield from _model(f"{name}: ", quantization_settings(kwargs))


def _reporters(names: Any) -> Iterator[_Need]:
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("all", "none"):
            continue
        if name not in _REPORTERS:
            raise UserError(f"report_to={name!r} is unknown. Set one of {', '.join(_REPORTERS)}, all or none.")
        modules, install = _REPORTERS[name]
        if modules:
            yield _Need(f"report_to={name}", modules, install, "report_to=none")


def _optimizer(name: Any) -> Iterator[_Need]:
    name = getattr(name, "value", name) or ""
    for start, module, install in _OPTIMIZERS:
        if name.startswith(start):
            yield _Need(f"optim={name}", (module,), install, "optim=adamw_torch")
            break
    if name.startswith("galore_adamw_8bit"):
        yield _Need(f"optim={name}", ("bitsandbytes",), "bitsandbytes", "optim=galore_adamw")


def _model(prefix: str, settings: Mapping[str, Any]) -> Iterator[_Need]:
    """Yield the packages that one model needs.

    Without FlashAttention, transformers falls back to a kernel from the hub, which the package kernels loads.
    """
    attention = settings.get("attn_implementation") or ""
    option, instead = f"{prefix}attn_implementation={attention}", "attn_implementation=sdpa"
    if attention == "flash_attention_2":
        install = "flash-attn --no-build-isolation (for GPUs of compute capability 8.0 and newer)"
        yield _Need(option, ("flash_attn", "kernels"), install, instead)
    elif attention == "flash_attention_3":
        yield _Need(option, ("flash_attn_interface", "kernels"), "kernels", instead)
    elif "/" in attention:
        yield _Need(option, ("kernels",), "kernels", instead)
    for name in ("load_in_4bit", "load_in_8bit"):
        if settings.get(name):
            yield _Need(f"{prefix}{name}=True", ("bitsandbytes",), "bitsandbytes", f"{name}=False")
