"""Names of options: aliases, options given twice, and the right name for a wrong one. Nothing is run."""

import logging
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tqdm import tqdm

from minillm_trl.cli import SUBCOMMANDS, AboveProgressBars, main
from minillm_trl.cli.arguments import DataArguments, Parser, parse, parse_with_config
from minillm_trl.cli.launch import read_flags
from minillm_trl.cli.option_names import ELSEWHERE, aliases, right_name
from minillm_trl.cli.stages import TRAINING
from minillm_trl.errors import UserError

STUDENT = ["--model_name_or_path", "student", "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]


def build(name: str):
    return import_module(f"minillm_trl.cli.{name.replace('-', '_')}").build_parser()


def parsed(name: str, *words: str) -> dict[type, object]:
    """The dataclasses of a training subcommand by their types."""
    teacher = [] if name == "sft" or any("teacher" in word for word in words) else ["--teacher", "t"]
    values, _ = parse(build(name), [*STUDENT, *teacher, *words])
    return {type(value): value for value in values}


def message(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What a command says that must end with status 2."""
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


class TestNamesOfTrl:
    @pytest.mark.parametrize("name", TRAINING)
    def test_they_and_the_older_ones_mean_the_same(self, name, file):
        trl = "dataset_name: data\ndataset_config: en\ndataset_train_split: a\ndataset_test_split: b\n"
        older = "dataset: data\ndataset_config: en\ndataset_train_split: a\ndataset_eval_split: b\n"
        expected = DataArguments("data", dataset_config="en", dataset_train_split="a", dataset_test_split="b")
        for text in (trl, older):
            assert parsed(name, "--config", file(text))[DataArguments] == expected
            words = [part for line in text.splitlines() for part in f"--{line}".split(": ")]
            assert parsed(name, *words)[DataArguments] == expected

    @pytest.mark.parametrize("name", [name for name in TRAINING if name != "sft"])
    @pytest.mark.parametrize("option", ["teacher", "teacher_model_name_or_path"])
    def test_teacher_has_two_names_in_training(self, name, option, file):
        config = file(f"dataset_name: data\n{option}: big\n")
        words = ["--dataset_name", "data", f"--{option}", "big"]
        for given in (["--config", config], words):
            values, _ = parse(build(name), [*STUDENT, *given])
            (teacher,) = [part for part in values if hasattr(part, "teacher_model_name_or_path")]
            assert teacher.teacher_model_name_or_path == "big"

    @pytest.mark.parametrize("option", ["teacher", "teacher_model_name_or_path"])
    @pytest.mark.parametrize("data", ["dataset", "dataset_name"])
    def test_and_in_evaluate(self, option, data, file):
        config = file(f"model: m\n{option}: big\n{data}: rows\noutput_dir: out\n")
        words = ["--model", "m", f"--{option}", "big", f"--{data}", "rows", "--output_dir", "out"]
        for given in (["--config", config], words):
            values, _ = parse_with_config(build("evaluate"), given)
            assert (values.teacher, values.dataset) == ("big", "rows")

    def test_command_line_wins_by_either_name(self, file):
        config = file("dataset: from_file\n")
        assert parsed("sft", "--config", config, "--dataset_name", "mine")[DataArguments].dataset_name == "mine"
        config = file("dataset_name: from_file\n")
        assert parsed("sft", "--config", config, "--dataset", "mine")[DataArguments].dataset_name == "mine"

    def test_two_names_with_two_values_are_refused(self, capsys, file):
        said = message(capsys, "sft", *STUDENT, "--dataset", "a", "--dataset_name", "b")
        assert "--dataset a and --dataset_name b" in said
        config = file("dataset: a\noutput_dir: out\ndataset_name: b\n")
        said = message(capsys, "sft", "--config", config)
        assert f"{config}:3: dataset_name is another name of dataset, and line 1 has a different value" in said
        said = message(capsys, "evaluate", "--teacher", "a", "--teacher_model_name_or_path", "b")
        assert "--teacher a and --teacher_model_name_or_path b" in said

    def test_two_names_with_one_value_are_no_contradiction(self, file):
        config = file("dataset: a\ndataset_name: a\n")
        assert parsed("sft", "--config", config)[DataArguments].dataset_name == "a"
        assert parsed("sft", "--dataset=a", "--dataset-name", "a")[DataArguments].dataset_name == "a"


class TestGivenTwice:
    @pytest.mark.parametrize("name", ["sft", "minillm", "prepare-data", "evaluate", "benchmark", "doctor"])
    def test_second_config_is_refused_with_both_names(self, name, capsys, file):
        first, second = file("seed: 1\n", "a.yaml"), file("seed: 2\n", "b.yaml")
        said = message(capsys, name, "--config", first, f"--config={second}")
        assert f"--config {first} and --config {second}" in said

    def test_other_options_may_be_overridden_by_the_end_of_the_command(self):
        words = ("--dataset_name", "a", "--dataset_train_split", "x", "--dataset_name", "b")
        assert parsed("sft", *words)[DataArguments] == DataArguments("b", dataset_train_split="x")

    def test_two_launch_configurations_are_refused(self):
        for other in (["--accelerate_config", "ddp_bf16"], ["--config_file", "ddp_bf16"]):
            with pytest.raises(UserError, match=r"--accelerate_config cpu and .*ddp_bf16"):
                read_flags([], ["--accelerate_config", "cpu", *other])

    def test_launch_configuration_of_the_command_line_wins_by_either_name(self):
        flags = read_flags(["--accelerate_config", "cpu", "--num_processes", "2"], ["--config_file", "mine.yaml"])
        assert flags == {"--config_file": "mine.yaml", "--num_processes": "2"}


class TestRightName:
    @pytest.mark.parametrize(
        ("name", "wrong", "right"),
        [
            ("minillm", "--torch_dtype", "'dtype'"),
            ("minillm", "--alpha", "'teacher_mixed_alpha'"),
            ("kd", "--alpha", "'kd_ratio'"),
            ("minillm", "--max-prompt-length", "prepare-data --max_prompt_length"),
            ("minillm", "--lr", "'learning_rate'"),
            ("minillm", "--max_new_tokens", "'max_completion_length'"),
            ("minillm", "--teacher_model", "'teacher_model_name_or_path'"),
            ("sft", "--max_seq_length", "'max_length'"),
            ("sft", "--teacher", "kd, seqkd, minillm and evaluate"),
            ("sft", "--evaluation_strategy", "'eval_strategy'"),
            ("prepare-data", "--dataset", "'source'"),
            ("evaluate", "--model_name_or_path", "'model'"),
            ("evaluate", "--max_completion_length", "'max_new_tokens'"),
            ("evaluate", "--dataset_test_split", "'split'"),
            ("evaluate", "--modle", "'model'"),
            ("generate", "--output_dir", "'output'"),
            ("generate", "--max_new_token", "'max_new_tokens'"),
            ("compare", "--basline", "'baseline'"),
            ("demo", "--sed", "'seed'"),
        ],
    )
    def test_is_offered_though_required_options_are_missing(self, name, wrong, right, capsys):
        said = message(capsys, name, wrong, "1")
        assert f"unknown option {wrong!r}" in said
        assert right in said

    def test_and_for_yaml(self, capsys, file):
        assert "Did you mean 'dtype'?" in message(capsys, "sft", "--config", file("torch_dtype: float32\n"))
        assert "Did you mean 'model'?" in message(capsys, "evaluate", "--config", file("model_name_or_path: m\n"))

    def test_every_name_of_the_table_leads_to_an_option(self):
        options = {name: {action.dest for action in build(name)._actions} for name in SUBCOMMANDS}
        for wrong, rights in ELSEWHERE.items():
            for right in rights:
                offered = [
                    name for name, known in options.items() if right in right_name(wrong, known) and wrong not in known
                ]
                assert offered, (wrong, right)

    @pytest.mark.parametrize("name", SUBCOMMANDS)
    def test_beginnings_of_options_are_not_guessed(self, name, capsys):
        said = message(capsys, name, "--see" if name in ("demo", "generate", *TRAINING) else "--outpu", "5")
        assert "unknown option" in said


class TestStrayWords:
    @pytest.mark.parametrize("name", [*TRAINING, "prepare-data", "evaluate", "benchmark", "doctor"])
    def test_yaml_without_its_option_is_led_to_it(self, name, capsys):
        assert "`--config good.yaml`" in message(capsys, name, "good.yaml")

    def test_and_after_other_options(self, capsys):
        assert "`--config good.yaml`" in message(capsys, "minillm", "--max_steps", "3", "good.yaml")

    def test_other_words_are_named(self, capsys):
        assert "unexpected 'stray'" in message(capsys, "generate", "--model", "m", "stray", "--prompt", "a")

    def test_values_with_dashes_and_lists_are_none(self):
        values, _ = parse_with_config(
            build("evaluate"),
            ["--model", "m", "--tasks", "a", "b", "--label_words", "--or so", "x", "--output_dir", "o", "--greedy"],
        )
        assert (values.tasks, values.label_words) == (["a", "b"], ["--or so", "x"])


class TestHelp:
    @pytest.mark.parametrize("name", SUBCOMMANDS)
    def test_percent_signs_are_single_and_required_options_have_no_default(self, name, capsys):
        parser = build(name)
        text = parser.format_help()
        assert "%%" not in text
        if isinstance(parser, Parser):
            required = [action for action in parser._actions if action.required]
            assert required
            for action in required:
                assert "(default" not in parser._get_formatter()._expand_help(action)

    def test_aliases_are_shown(self):
        text = build("minillm").format_help()
        value = "" if sys.version_info >= (3, 13) else " DATASET_NAME"  # argparse writes it once since 3.13
        assert f"--dataset_name{value}, --dataset DATASET_NAME" in text
        assert aliases(build("minillm")) == {
            "dataset": "dataset_name",
            "dataset_eval_split": "dataset_test_split",
            "teacher": "teacher_model_name_or_path",
        }


class TestDoctor:
    def test_config_that_does_not_exist_is_refused_before_a_launch_line(self, capsys):
        assert main(["doctor", "--config", "nope.yaml"]) == 2
        captured = capsys.readouterr()
        assert "--config nope.yaml: no such file" in captured.err
        assert "Launch with" not in captured.out


class TestWarnings:
    def test_they_appear_above_a_progress_bar(self, capsys):
        logger = logging.getLogger("minillm_trl.some_module")
        handler = AboveProgressBars(logging.WARNING)
        bar = tqdm(total=2, file=sys.stderr, desc="Training", mininterval=0)
        bar.update()
        handler.handle(logger.makeRecord(logger.name, logging.WARNING, "f", 1, "lengths collapse", (), None))
        bar.close()
        lines = [line.rpartition("\r")[2].strip() for line in capsys.readouterr().err.splitlines()]
        assert "lengths collapse" in lines

    def test_command_line_prints_through_it(self, monkeypatch, capsys):
        monkeypatch.setattr(logging, "lastResort", None)
        message(capsys, "demo", "--sed", "1")
        assert isinstance(logging.lastResort, AboveProgressBars)
