"""YAML files, command lines and model folders for `fuzzing.py`, most of them broken."""

import argparse
import json
import shutil
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import yaml
from conftest import build_model, build_tokenizer
from fuzz_input import Input, command, spoil_bytes, spoil_file, spoil_tree, wild
from fuzz_records import small_recipe
from peft import LoraConfig, get_peft_model

TRAINING = ("sft", "kd", "seqkd", "minillm")
# without `benchmark`, which is parsed as `evaluate` is and takes seconds to find its tasks
_COMMANDS = (*TRAINING, "prepare-data", "evaluate", "generate", "merge", "compare", "judge", "recipe")
# a file or folder whose name may be broken
_UNKNOWN = (
    *("no tokenizer at ", "neither a local file or folder", "no such file or folder", "no results of `minillm-trl"),
    "holds no file of the split",
)


def recipe_files(random: Random, folder: Path) -> Input:
    """Make a recipe with one broken file."""
    recipe = small_recipe(folder)
    path = random.choice(sorted(recipe.glob("*.yaml")))
    values = yaml.safe_load(path.read_text())
    if random.random() < 0.6:
        values = spoil_tree(random, values)
    _write_yaml(random, path, values)
    return command("recipe", recipe, "--list", names=(recipe,))


_YAML_WORDS = (
    *(
        "!!python/object/apply:os.system [echo]",
        "!x 1",
        "!!int a",
        "!!float []",
        "!!timestamp 1",
        "2024-13-45",
        "2024-01-01",
    ),
    *(
        "&a [*a]",
        "*missing",
        "[1, 2",
        "{a: 1",
        "'",
        '"',
        "|",
        ">",
        "? [a]\n: b",
        "<<: {seed: 1}",
        "<<: 3",
        "1e-5",
        ".nan",
    ),
    *(
        ".inf",
        "0o17",
        "12:30:45",
        "on",
        "no",
        "~",
        "%x",
        "@x",
        "`x`",
        "\tx",
        "- a",
        "!!binary gIGC",
        "!!set {a}",
        "2" * 5000,
    ),
    *("&a {x: &b [1,1,1,1,1,1,1,1,1]}", "[" * 3000),
)
_BOMB = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


def _write_yaml(random: Random, path: Path, values: Any) -> None:
    try:
        text = yaml.safe_dump(values, allow_unicode=random.random() < 0.5)
    except yaml.YAMLError:
        text = "a: 1\n"
    lines = text.splitlines()
    for _ in range(random.choice((0, 0, 0, 0, 1, 2))):
        place = random.randrange(len(lines) + 1)
        known = random.choice(lines).split(":")[0] if lines else "a"
        line = f"{random.choice((known, 'seed', 'env', 'x', '? '))}: {random.choice(_YAML_WORDS)}"
        lines.insert(place, random.choice((line, line, known, random.choice(_YAML_WORDS), _BOMB)))
    data = "\n".join(lines).encode("utf-8", errors="surrogatepass")
    path.write_bytes(spoil_bytes(random, data) if random.random() < 0.15 else data)


@cache
def _options(name: str) -> list[argparse.Action]:
    module = import_module(f"minillm_trl.cli.{name.replace('-', '_')}")
    return [action for action in module.build_parser()._actions if action.dest not in ("help", "config")]


def _likely(random: Random, action: argparse.Action) -> Any:
    """Return a valid value of the option."""
    if action.choices:
        return random.choice(list(action.choices))
    if action.type is int:
        return random.choice((0, 1, 2, 8, -1))
    if action.type is float:
        return random.choice((0.0, 0.5, 1.0, 1e-5, "1e-5"))
    if action.nargs == 0 or "bool" in str(getattr(action.type, "__name__", "")):
        return random.random() < 0.5
    return action.default if isinstance(action.default, str | int | float | bool | None) else "x"


def _needed(name: str, folder: Path) -> dict[str, Any]:
    """Return the required options of a subcommand. There is no model, so nothing is trained."""
    data = folder / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    empty, output = str(folder / "empty"), str(folder / "out")
    (folder / "empty").mkdir()
    if name in TRAINING:
        needed = {
            "dataset": str(data),
            "model_name_or_path": empty,
            "output_dir": output,
            "use_cpu": True,
            "bf16": False,
        }
        return needed if name == "sft" else {**needed, "teacher_model_name_or_path": empty}
    return {
        "prepare-data": {"task": "examples", "source": str(data), "output_dir": output},
        "evaluate": {"model": empty, "dataset": str(data), "output_dir": output},
        "benchmark": {
            "model": empty,
            "tasks": ["none"],
            "batch_size": "x",
            "output_dir": output,
        },  # finding tasks is slow
        "generate": {"model": empty, "prompt": ["a"]},
        "merge": {"adapter": empty, "output_dir": output},
        "compare": {"runs": [empty]},
        "judge": {"runs": [empty], "base_url": "http://localhost:9/v1", "judge_model": "m", "output_dir": output},
        "recipe": {"folder": empty},
    }[name]


def yaml_file(random: Random, folder: Path) -> Input:
    """Make a YAML file for a subcommand, with valid and wild values of its options."""
    name = random.choice((*TRAINING, "prepare-data", "evaluate"))
    values = _needed(name, folder)
    options = _options(name)
    for action in random.sample(options, random.choice((0, 1, 1, 2, 5))):
        values[action.dest] = wild(random) if random.random() < 0.5 else _likely(random, action)
    if random.random() < 0.2:
        values = spoil_tree(random, values)
    path = folder / "run.yaml"
    _write_yaml(random, path, values)
    names = (path, folder, *_UNKNOWN, *(action.dest for action in options))
    return command(name, "--config", path, names=names)


def command_line(random: Random, folder: Path) -> Input:
    """Make a command line with valid, wild and misspelt options, and with missing, repeated and moved words."""
    name = random.choice(_COMMANDS)
    needed, options = _needed(name, folder), _options(name)
    words: list[str] = []
    for key, value in needed.items():
        values = [str(each) for each in (value if isinstance(value, list) else [value])]
        words += values if key in ("runs", "folder") else [f"--{key}", *values]
    for action in random.sample(options, random.choice((0, 1, 1, 2, 4))):
        value = random.choice((wild(random), _likely(random, action)))
        option = random.choice(action.option_strings or [""])
        option = option[:-1] if random.random() < 0.1 else option
        words += [f"{option}={value}"] if random.random() < 0.2 else [option, str(value)]
    for _ in range(random.choice((0, 0, 1, 2))):
        place = random.randrange(len(words) + 1)
        extra = random.choice(("stray", "--", "-", "", "--unknown", "-x", "--num_processes", "--config", "\udcff"))
        words[place : place + random.randrange(2)] = [extra] if random.random() < 0.6 else []
    words = [word.replace("\0", "")[:1000] for word in words]  # what a system can pass on
    values = [part for word in words for part in (word, repr(word), *word.split("=", 1)) if part.strip()]
    names = (*values, "''", folder, *_UNKNOWN, *(name for action in options for name in (action.dest, action.metavar)))
    return command(name, *words, names=names)


@cache
def _models(place: str) -> tuple[Path, Path]:
    """Save a tiny model and an adapter for it, once."""
    model, adapter = Path(place) / "model", Path(place) / "adapter"
    tokenizer = build_tokenizer()
    build_model("gpt2", len(tokenizer), width=16, layers=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    lora = get_peft_model(build_model("gpt2", len(tokenizer), width=16, layers=1), LoraConfig(r=2))
    lora.peft_config["default"].base_model_name_or_path = str(model)
    lora.save_pretrained(adapter)
    return model, adapter


def model_folder(random: Random, folder: Path) -> Input:
    """Make a model or adapter with one broken file, for `generate`, `evaluate` and `merge`."""
    model, adapter = (Path(shutil.copytree(path, folder / path.name)) for path in _models(str(folder.parents[0])))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))
    name = random.choice(("generate", "generate", "evaluate", "merge", "merge", "adapter"))
    if name == "merge":
        words = ["merge", "--adapter", adapter, "--output_dir", folder / "out"]
    elif name == "evaluate":
        words = [
            "evaluate",
            *("--model", model),
            *("--dataset", folder / "x.jsonl"),
            *("--output_dir", folder / "out"),
        ]
        words += ["--max_new_tokens", 2, "--greedy"]
        (folder / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    else:
        words = ["generate", "--model", adapter if name == "adapter" else model, "--prompt", "the"]
        words += ["--max_new_tokens", 2, "--output", folder / "out.jsonl"]
    files = [*model.glob("*"), *(adapter.glob("*") if name in ("merge", "adapter") else ())]
    spoilt = spoil_file(random, [path for path in files if path.suffix in (".json", ".safetensors", ".jinja")])
    return command(*words, names=(spoilt.parent, "embeddings only"))
