"""YAMLs and launch lines of the recipes are parsed by the real parsers, and the recipes agree with each other."""

import json
import re
import shlex
import sys
from importlib import import_module
from itertools import dropwhile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from minillm_trl.cli import SUBCOMMANDS
from minillm_trl.cli.arguments import Parser, parse, parse_plain, parse_with_config
from minillm_trl.cli.launch import accelerate_config_path
from minillm_trl.cli.stages import TRAINING, read_recipe
from minillm_trl.hardware import optional_packages

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
sys.path[:0] = [str(ROOT / "benchmarks"), str(RECIPES)]

import generate  # noqa: E402 - lies in a folder that is no package
import recipe_memory  # noqa: E402 - likewise

PAPER = sorted(path.parent for path in RECIPES.glob("*-from-*/recipe.yaml"))
STAGES = [path for path in sorted(RECIPES.glob("*/*.yaml")) if path.stem != "recipe"]
STAGES = [path for path in STAGES if path.parent.name != "accelerate_configs"]
MULTI_NODE = sorted((RECIPES / "accelerate_configs").glob("*multi_node*.yaml"))
# Programs that this package does not bring, and scripts whose own tests run them
PROGRAMS = ("make", "pip", "python", "git", "cd", "mkdir", "export", "ollama", "grep", "trackio")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RECIPES.rglob("README.md"))]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def subcommand_of(path: Path) -> str:
    recipe = path.with_name("recipe.yaml")
    stages = yaml.safe_load(recipe.read_text())["stages"] if recipe.is_file() else {}
    if path.stem in stages:
        return stages[path.stem].partition(" ")[0]
    if path.parent.name == "data" or path.stem == "dolly":
        return "prepare-data"
    name = path.stem.split("_")[0]
    return "evaluate" if name == "eval" else name


def parse_line(name: str, words: list[str]):
    """As the subcommand does, without running it."""
    parser = import_module(f"minillm_trl.cli.{name.replace('-', '_')}").build_parser()
    if isinstance(parser, Parser):
        return parse(parser, words)
    if name == "benchmark" and "--config" in words:  # of a YAML on its page, which test_benchmark_command.py writes
        return None
    return parse_with_config(parser, words)[0] if name in ("evaluate", "shrink") else parse_plain(parser, words)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stage_is_parsed_and_names_its_launch_line(path: Path):
    name, relative = subcommand_of(path), path.relative_to(ROOT)
    lines = [line for line in path.read_text().splitlines() if line.startswith(f"#   minillm-trl {name} --config ")]
    assert len(lines) == 1
    words = shlex.split(lines[0].removeprefix("#   minillm-trl "))[1:]
    assert words[1] == str(relative)
    parsed = parse_line(name, words)
    if name in TRAINING:
        assert set(parsed[1]) in ({"--accelerate_config", "--num_processes"}, set())


def commands(text: str) -> list[list[str]]:
    """Words of the commands of a page, in blocks and, with all that they need, in lines of text."""
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [command for command in re.findall(r"`(minillm-trl [^`]*)`", prose) if " --config" in command]
    found = [shlex.split(line.replace("\n", " "), comments=True) for line in lines]
    # without the variables of the environment that stand before a command
    found = [list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)) for words in found]
    return [words for words in found if words]


def parse_command(words: list[str]) -> None:
    """Parse a command of a page with the real parsers; placeholders stand for something that is there."""
    if words[-1] in ("...", "…"):
        words = [*words[:-1], "--model_name_or_path", "student"]
    words = [
        "recipes/e2e_demo/minillm.yaml" if word.endswith(("my.yaml", "faq.yaml", "FILE.yaml", "run.yaml")) else word
        for word in words
    ]
    if words[:2] == ["accelerate", "launch"]:
        arguments = launch_command_parser().parse_args(words[2:])
        assert arguments.training_script == "minillm_trl"
        parse_line(arguments.training_script_args[0], arguments.training_script_args[1:])
        return
    assert words[1] in SUBCOMMANDS
    parse_line(words[1], words[2:])
    if "--accelerate_config" in words:
        assert accelerate_config_path(words[words.index("--accelerate_config") + 1]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_parsed(page: Path, monkeypatch):
    # a page may install a package first, as `pip install trackio`, which is not needed to parse its commands
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: name)
    for words in commands(page.read_text()):
        if words[0] in ("minillm-trl", "accelerate"):
            parse_command(words)
        else:
            assert words[0] in PROGRAMS, words


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "accelerate_configs").glob("*multi_node*.yaml")), ids=lambda p: p.stem
)
def test_head_of_a_configuration_for_several_machines_says_how_to_launch(path: Path):
    head = re.search(r"#   (accelerate launch .*?)\n(?!#)", path.read_text(), flags=re.DOTALL).group(1)
    words = shlex.split(head.replace("\\\n#", " "))
    assert words[3] == str(path.relative_to(ROOT))
    parse_command(words)


def load(folder: Path, name: str) -> dict:
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def processes(folder: Path) -> int:
    return int(re.search(r"--num_processes (\d+)", (folder / "recipe.yaml").read_text()).group(1))


@pytest.mark.parametrize("folder", PAPER, ids=lambda folder: folder.name)
class TestPaperRecipe:
    @pytest.mark.parametrize("name", ["minillm", "minillm_original_code", "minillm_lora", "minillm_qlora"])
    def test_minillm_has_the_papers_buffer_and_mini_batch_and_starts_from_sft_init(self, folder: Path, name: str):
        values = load(folder, name)
        rows = values["per_device_train_batch_size"] * processes(folder)
        assert rows * values["gradient_accumulation_steps"] == 64
        assert rows * values["steps_per_generation"] == 256
        assert values["num_iterations"] == 4
        assert values["steps_per_generation"] % values["gradient_accumulation_steps"] == 0
        buffer_steps = values["num_iterations"] * 256 // 64
        assert values["save_steps"] == values["eval_steps"]
        assert values["save_steps"] % buffer_steps == 0  # between two rollouts
        assert values["max_steps"] == 5000
        assert values["model_name_or_path"] == load(folder, "sft_init")["output_dir"]
        assert values["teacher_model_name_or_path"] == load(folder, "sft_teacher")["output_dir"]
        assert values["metric_for_best_model"] == "eval_rouge_l"
        if name == "minillm":
            assert values["learning_rate"] == 5e-6

    def test_baselines_have_one_budget_and_one_rule_of_selection(self, folder: Path):
        sft, kd, seqkd, init = (load(folder, name) for name in ("sft", "kd", "seqkd", "sft_init"))
        same = ("model_name_or_path", "learning_rate", "num_train_epochs", "seed", "max_length", "dataset_name")
        same += ("per_device_train_batch_size", "gradient_accumulation_steps", "metric_for_best_model")
        for other in (kd, seqkd):
            assert [other[key] for key in same] == [sft[key] for key in same]
        assert sft["metric_for_best_model"] == "eval_rouge_l"
        assert (init["metric_for_best_model"], init["num_train_epochs"]) == ("eval_loss", 3)
        batch = sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"] * processes(folder)
        assert batch in (32, 64)

    def test_stages_write_to_folders_of_their_own_and_seeds_agree(self, folder: Path):
        values = [load(folder, path.stem) for path in folder.glob("*.yaml") if path.stem not in ("recipe", "eval")]
        outputs = [config["output_dir"] for config in values]
        assert len(set(outputs)) == len(outputs)
        assert all(output.startswith(f"runs/{folder.name}/") for output in outputs)
        assert {config["seed"] for config in values} == {10}
        launch = {re.search(r"--num_processes (\d+)", path.read_text()) for path in folder.glob("[skm]*.yaml")}
        assert {int(match.group(1)) for match in launch} == {processes(folder)}

    def test_page_has_the_launch_line_of_each_yaml_and_the_estimates(self, folder: Path):
        text = (folder / "README.md").read_text()
        for path in folder.glob("*.yaml"):
            if path.stem in ("recipe", "eval"):
                continue
            line = re.search(r"^#   (minillm-trl .*)$", path.read_text(), flags=re.MULTILINE).group(1)
            assert f"\n{line}\n" in text
            quantised = "load_in_4bit: true\n" in path.read_text()
            assert not (quantised and "fsdp" in line)  # which refuses quantised students
        results = json.loads((ROOT / "benchmarks" / "results" / "recipe_memory.json").read_text())["results"]
        table = recipe_memory.table(results[folder.name])
        assert recipe_memory.START + table + recipe_memory.END in text
        limit = 32 * 10**9 / 2**30
        assert all(stage["gpu"] < 0.95 * limit for stage in results[folder.name].values())

    def test_evaluation_covers_all_methods_with_the_papers_settings(self, folder: Path):
        recipe = read_recipe(folder.relative_to(ROOT))
        names = [stage.name for stage in recipe.stages]
        assert {f"evaluate:{name}" for name in ("sft_teacher", "sft", "kd", "seqkd", "minillm")} <= set(names)
        by_name = {stage.name: stage for stage in recipe.stages}
        inputs = {name: {source.name for source in recipe.inputs(stage)} for name, stage in by_name.items()}
        assert inputs["minillm"] == {"dolly", "sft_teacher", "sft_init"}
        assert inputs["kd"] == inputs["seqkd"] == {"dolly", "sft_teacher"}
        values = load(folder, "eval")
        teacher = {"sft_teacher"} if "teacher" in values else set()
        assert inputs["evaluate:kd"] == {"dolly", "selfinst", "vicuna", "sni", "unni", "kd"} | teacher
        assert recipe.teacher == "sft_teacher"
        assert (values["seeds"], values["temperature"], values["max_new_tokens"]) == ([10, 20, 30, 40, 50], 1.0, 256)


def test_yamls_of_the_pairs_are_as_generated():
    found = {path.relative_to(RECIPES): path.read_text() for folder in PAPER for path in folder.glob("*.yaml")}
    made = generate.make_files()
    different = sorted(str(path) for path in found.keys() | made.keys() if found.get(path) != made.get(path))
    assert not different, "edit recipes/pairs.yaml or recipes/templates, then run `python recipes/generate.py`"


def test_batches_that_do_not_fill_an_optimizer_step_are_refused(monkeypatch):
    pairs = yaml.safe_load((RECIPES / "pairs.yaml").read_text())
    pairs["gpt2-120m-from-1.5b"]["gpus"] = 3
    monkeypatch.setattr(generate.yaml, "safe_load", lambda text: pairs)
    with pytest.raises(ValueError, match=r"gpt2-120m-from-1\.5b.*32.*24"):
        generate.make_files()


def test_ten_pairs_are_there_and_listed():
    assert len(PAPER) == 10
    text = (RECIPES / "README.md").read_text()
    assert all(f"({folder.name}/README.md)" in text for folder in PAPER)


@pytest.mark.parametrize("page", sorted(RECIPES.rglob("README.md")), ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
