"""A package that an option needs is asked for while the command line is parsed, with the line that installs it."""

from pathlib import Path

import pytest
from transformers import BitsAndBytesConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from minillm_trl.cli import main
from minillm_trl.errors import MissingPackageError, UserError
from minillm_trl.hardware import optional_packages
from minillm_trl.hardware.optional_packages import check_packages

NF4 = {"load_in_4bit": True}
NEEDS = [  # settings; option, module and `pip install` line that the message has
    ({"report_to": ["none", "wandb"]}, "report_to=wandb", "wandb", "pip install wandb"),
    ({"report_to": "tensorboard"}, "report_to=tensorboard", "tensorboard", "pip install tensorboard"),
    ({"report_to": ["comet_ml"]}, "report_to=comet_ml", "comet_ml", "pip install comet-ml"),
    ({"use_vllm": True}, "use_vllm=True", "vllm", "pip install 'minillm-trl[vllm]'"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True", "liger_kernel", "pip install liger-kernel"),
    (
        {"attn_implementation": "flash_attention_2"},
        "attn_implementation=flash_attention_2",
        "flash_attn",
        "flash-attn",
    ),
    ({"attn_implementation": "kernels-community/flash-attn2"}, "kernels-community", "kernels", "pip install kernels"),
    (
        {"teacher_model_init_kwargs": {"attn_implementation": "flash_attention_3"}},
        "teacher_model_init_kwargs: attn_implementation=flash_attention_3",
        "flash_attn_interface",
        "pip install kernels",
    ),
    ({"optim": OptimizerNames.PAGED_ADAMW_8BIT}, "optim=paged_adamw_8bit", "bitsandbytes", "pip install bitsandbytes"),
    ({"optim": "ademamix"}, "optim=ademamix", "bitsandbytes", "pip install bitsandbytes"),
    ({"optim": "adamw_torch_4bit"}, "optim=adamw_torch_4bit", "torchao", "pip install torchao"),
    ({"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw", "schedulefree", "pip install schedulefree"),
    ({"load_in_4bit": True}, "load_in_4bit=True", "bitsandbytes", "pip install bitsandbytes"),
    (
        {"teacher_model_init_kwargs": {"quantization_config": NF4}},
        "teacher_model_init_kwargs: load_in_4bit=True",
        "bitsandbytes",
        "pip install bitsandbytes",
    ),
    (
        {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(**NF4)}},
        "model_init_kwargs: load_in_4bit=True",
        "bitsandbytes",
        "pip install bitsandbytes",
    ),
]


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """Modules that are there, of all that an option may ask for: none, until a test adds some."""
    modules: set[str] = set()
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: name if name in modules else None)
    return modules


@pytest.mark.parametrize(("settings", "option", "module", "line"), NEEDS)
def test_each_option_names_its_package(installed, settings: dict, option: str, module: str, line: str):
    with pytest.raises(MissingPackageError) as raised:
        check_packages(settings)
    assert option in str(raised.value)
    assert f"needs the package {module}, " in str(raised.value)
    assert line in str(raised.value)
    installed.add(module)
    check_packages(settings)


def test_a_substitute_is_enough(installed):
    installed |= {"tensorboardX", "kernels"}
    check_packages({"report_to": "tensorboard", "attn_implementation": "flash_attention_2"})


def test_galore_in_8_bits_needs_both(installed):
    installed.add("galore_torch")
    check_packages({"optim": "galore_adamw_layerwise"})
    with pytest.raises(MissingPackageError, match="package bitsandbytes"):
        check_packages({"optim": "galore_adamw_8bit_layerwise"})


def test_what_comes_with_the_installation_needs_nothing(installed):
    check_packages({})
    check_packages({"report_to": "none", "attn_implementation": "sdpa", "use_vllm": False, "model_init_kwargs": None})
    check_packages({"report_to": ["all", "kubeflow"], "load_in_8bit": False, "teacher_model_init_kwargs": {}})


def test_unknown_reporter_is_refused(installed):
    with pytest.raises(UserError, match=r"report_to='wandbb' is unknown. Set one of .*wandb"):
        check_packages({"report_to": ["wandbb"]})


def test_every_reporter_and_optimizer_of_transformers_has_an_entry(installed):
    assert set(optional_packages._REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    own = {name.value for name in OptimizerNames if not list(optional_packages._optimizer(name))}
    of_torch = {f"adamw_torch{ending}" for ending in ("", "_fused", "_xla", "_npu_fused")}
    assert own == of_torch | {"adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.mark.parametrize(
    ("subcommand", "words", "option"),
    [
        ("sft", ["--report_to", "wandb"], "report_to=wandb"),
        ("kd", ["--attn_implementation", "flash_attention_2"], "attn_implementation=flash_attention_2"),
        ("seqkd", ["--use_vllm", "true"], "use_vllm=True"),
        ("minillm", ["--report_to", "tensorboard", "--accelerate_config", "cpu"], "report_to=tensorboard"),
    ],
)
def test_command_line_looks_before_data_and_models(tmp_path: Path, capsys, installed, subcommand, words, option):
    teacher = [] if subcommand == "sft" else ["--teacher_model_name_or_path", "none"]
    command = [subcommand, "--dataset", "none.jsonl", "--model_name_or_path", "none", *teacher, *words]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert option in message
    assert "pip install" in message
    assert not (tmp_path / "out").exists()
