"""Claim: by estimate, the stages of each recipe fit into the GPUs that it names.

    python benchmarks/recipe_memory.py

loads no model: sizes come from the models' published configurations, batches and launch configurations from the YAMLs
of the recipes. The formulas are in `minillm_trl/hardware/memory_estimate.py`; `memory_estimate.py` compares them with
training on one GPU.
Writes `results/recipe_memory.json` and the tables in the recipes' READMEs.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from measurement import write_record
from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from minillm_trl.hardware.memory_estimate import (
    Workload,
    count_parameters,
    estimate_fine_tuning_memory,
    estimate_memory,
)

RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = ("sft_teacher", "sft", "kd", "seqkd", "minillm", "minillm_lora", "minillm_qlora")
START, END = "<!-- memory: made by benchmarks/recipe_memory.py -->\n", "\n<!-- end of memory -->"
GIB = 2**30
PROMPT_TOKENS = 256  # the filter of recipes/data


def gpt2(width: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def opt(width: int, layers: int, heads: int) -> OPTConfig:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)


def llama(width: int, layers: int, heads: int, feed_forward: int) -> LlamaConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return LlamaConfig(intermediate_size=feed_forward, **sizes)


def qwen(kind: type[PreTrainedConfig], width: int, layers: int, heads: int, kv_heads: int, feed_forward: int, **more):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return kind(num_key_value_heads=kv_heads, intermediate_size=feed_forward, **sizes, **more)


MODELS = {
    "openai-community/gpt2": gpt2(768, 12, 12),
    "openai-community/gpt2-medium": gpt2(1024, 24, 16),
    "openai-community/gpt2-large": gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": gpt2(1600, 48, 25),
    "facebook/opt-1.3b": opt(2048, 24, 32),
    "facebook/opt-2.7b": opt(2560, 32, 32),
    "facebook/opt-6.7b": opt(4096, 32, 32),
    "facebook/opt-13b": opt(5120, 40, 40),
    "huggyllama/llama-7b": llama(4096, 32, 32, 11008),
    "huggyllama/llama-13b": llama(5120, 40, 40, 13824),
    "Qwen/Qwen2.5-0.5B": qwen(Qwen2Config, 896, 24, 14, 2, 4864, vocab_size=151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": qwen(Qwen2Config, 1536, 28, 12, 2, 8960, vocab_size=151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": qwen(Qwen2Config, 3584, 28, 28, 4, 18944, vocab_size=152064, tie_word_embeddings=False),
    "Qwen/Qwen3-0.6B-Base": qwen(
        Qwen3Config, 1024, 28, 16, 8, 3072, head_dim=128, vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-4B-Base": qwen(
        Qwen3Config, 2560, 36, 32, 8, 9728, head_dim=128, vocab_size=151936, tie_word_embeddings=True
    ),
}


def read_stage(folder: Path, name: str) -> tuple[dict[str, Any], str, int]:
    """Read a YAML's values, and the strategy and number of processes from the launch line in its head."""
    text = (folder / f"{name}.yaml").read_text()
    launch = re.search(r"--accelerate_config v100_(\w+)_fp16 --num_processes (\d+)", text)
    return yaml.safe_load(text), launch.group(1), int(launch.group(2))


def estimate(folder: Path, name: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> dict[str, float]:
    """Estimate the GiB of one stage on a GPU, in host memory during loading, and of a checkpoint on disk."""
    values, strategy, processes = read_stage(folder, name)
    model = teacher if name == "sft_teacher" else student
    size, teacher_size = count_parameters(model), count_parameters(teacher)
    rows = values["per_device_train_batch_size"]
    samples = values.get("predict_with_generate", False)
    load = Workload(
        rows=rows,
        sampled_rows=values["per_device_eval_batch_size"] if samples else values.get("sampling_batch_size", 0),
        buffered_rows=rows * values.get("steps_per_generation", 1),
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=values.get("max_length", 512) - PROMPT_TOKENS,
        lora_rank=values.get("lora_r"),
        base_in_float32=values.get("dtype", "float32") == "float32",
        student_4bit=values.get("load_in_4bit", False),
        teacher_4bit="quantization_config" in values.get("teacher_model_init_kwargs", {}),
        strategy=strategy,
        processes=processes,
        shard_teacher=values.get("shard_teacher", False),
        merged_rollouts=name.startswith("minillm"),
    )
    if name.startswith("minillm"):
        parts = estimate_memory(student, teacher, load)
    else:
        parts = estimate_fine_tuning_memory(model, load, teacher if name == "kd" else None)
    peaks = {"while sampling": parts["while sampling"], "while updating": parts["while updating"]}
    if not samples and not name.startswith("minillm"):
        del peaks["while sampling"]
    if name == "seqkd":  # on each GPU, the complete teacher answers before the student is loaded
        answering = replace(load, sampled_rows=values["generation_batch_size"])
        caches = estimate_memory(teacher, teacher, answering)["key-value caches while sampling"] / 2
        peaks["while the teacher answers"] = 2.0 * teacher_size + caches
    adapter = values.get("use_peft", False)
    host = 0.0 if load.student_4bit else 4.0 * size * processes
    if name == "seqkd":
        host = max(host, 2.0 * teacher_size * processes)
    checkpoint = 0.0 if adapter else (16.0 if strategy == "fsdp" else 12.0) * size
    return {"gpu": max(peaks.values()) / GIB, "host": host / GIB, "checkpoint": checkpoint / GIB} | {
        peak: value / GIB for peak, value in peaks.items()
    }


def table(stages: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table of a recipe."""
    lines = ["| stage | peak of a GPU | at its peak | host memory while loading, all processes | a checkpoint |"]
    lines.append("|---|---:|---|---:|---:|")
    for name, found in stages.items():
        peak = max((key for key in found if key.startswith("while")), key=found.__getitem__)
        cells = [f"`{name}`", f"{found['gpu']:.0f} GiB", peak]
        cells += [f"{found[key]:.0f} GiB" if found[key] >= 0.5 else "under 1 GiB" for key in ("host", "checkpoint")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {}
    for recipe in sorted(RECIPES.glob("*-from-*/recipe.yaml")):
        folder = recipe.parent
        student, teacher = (
            MODELS[read_stage(folder, name)[0]["model_name_or_path"]] for name in ("sft", "sft_teacher")
        )
        results[folder.name] = {name: estimate(folder, name, student, teacher) for name in STAGES}
        before, rest = (folder / "README.md").read_text().split(START)
        text = before + START + table(results[folder.name]) + END + rest.split(END)[1]
        (folder / "README.md").write_text(text)
        print(f"{folder.name}\n{table(results[folder.name])}\n")
    write_record("recipe_memory", ("torch", "transformers"), {"prompt_tokens": PROMPT_TOKENS}, results)


if __name__ == "__main__":
    main()
