"""What the command line imports before it has work to do; what takes seconds is imported where it is used."""

import logging
import subprocess
import sys

import pytest
from evaluation_results import write_results

from minillm_trl.cli import SUBCOMMANDS, main

pytestmark = [pytest.mark.cli, pytest.mark.smoke]  # the point is what a fresh process imports

TRAINING = ("sft", "kd", "seqkd", "minillm")
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "deepspeed", "matplotlib", "nltk")
# what a training's options need is TRL's configurations, and with them torch, transformers and peft
NOT_FOR_OPTIONS = ("datasets", "deepspeed", "matplotlib", "nltk", "lm_eval", "trl.trainer.grpo_trainer")

IMPORTED = """
import sys
{code}
print(*(name for name in {names} if name in sys.modules))
"""


def imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Those of the modules that a new process has imported after the code."""
    words = [sys.executable, "-c", IMPORTED.format(code=code, names=names)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()


def building(names: list[str]) -> str:
    modules = [name.replace("-", "_") for name in names]
    return "from importlib import import_module\n" + "\n".join(
        f"import_module('minillm_trl.cli.{module}').build_parser().format_help()" for module in modules
    )


def test_help_of_plain_subcommands_imports_no_heavy_library():
    assert imported(building([name for name in SUBCOMMANDS if name not in TRAINING]), HEAVY) == []


def test_help_of_training_subcommands_imports_what_the_configurations_of_trl_do_and_no_more():
    assert imported(building(list(TRAINING)), NOT_FOR_OPTIONS) == []


def test_comparing_imports_numpy_and_no_model_library(tmp_path):
    folder = write_results(tmp_path / "student", {"rouge_l": [1.0, 2.0, 4.0]})
    code = f"from minillm_trl.cli import main\nassert main(['compare', {str(folder)!r}]) == 0"
    assert imported(code, ("numpy", *HEAVY)) == ["numpy"]


def test_preparing_data_without_a_tokenizer_imports_no_model_library(tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text('{"prompt": "the mill", "completion": "is cheap"}\n')
    words = ["prepare-data", "--task", "examples", "--source", str(source), "--output_dir", str(tmp_path / "data")]
    code = f"from minillm_trl.cli import main\nassert main({words}) == 0"
    assert imported(code, ("torch", "accelerate", "peft")) == []


@pytest.mark.parametrize("package", ["minillm_trl", "minillm_trl.data", "minillm_trl.baselines"])
def test_packages_list_what_they_import_lazily(package):
    code = f"""
import {package} as package
assert set(package.__all__) <= set(dir(package))
for name in package.__all__:
    getattr(package, name)
try:
    package.missing
except AttributeError as error:
    assert "has no attribute 'missing'" in str(error)
else:
    raise AssertionError
"""
    if package == "minillm_trl.data":
        assert "datasets" in imported(code, HEAVY)
    else:
        exec(code, {})


def test_advice_of_bitsandbytes_to_install_a_kernel_is_not_shown():
    """Its other warnings are."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert main(["no such command"]) == 2

    def passes(message: str) -> bool:
        return bool(
            logger.filter(logger.makeRecord(logger.name, logging.WARNING, "ops.py", 1, message, ("why",), None))
        )

    assert not passes("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please install it")
    assert passes("Failed to load something else: %s")
