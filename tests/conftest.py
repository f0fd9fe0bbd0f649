"""Tiny models and a tiny tokenizer, built in process: nothing is downloaded."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# For subprocesses: offline, and one thread each, since tests run in parallel
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(sys.path[1:]),  # scripts use helpers from all test folders
}


# Marks of tests that start processes, each of which imports libraries for seconds before it does anything
PROCESSES = {"cli", "distributed", "notebooks"}


def marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


@pytest.hookimpl(tryfirst=True)  # before pytest applies `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes as slow, except the smoke tests."""
    for item in items:
        if marks(item) & PROCESSES and "smoke" not in marks(item):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collection, which each `train()` runs, and which took half of its time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts Python without a mark for this, to keep `make test` quick."""
    if marks(item) & {"slow", "smoke"}:
        return (yield)
    start = subprocess.Popen.__init__

    def refuse_python(process: subprocess.Popen, command: object, *arguments: object, **options: object) -> None:
        words = [command] if isinstance(command, str | os.PathLike) else list(command)
        loads_library = len(words) > 2 and "LoadLibrary" in str(
            words[2]
        )  # of torch's compiler, which tries what it built
        if "python" in os.path.basename(os.fspath(words[0])) and not loads_library:
            pytest.fail(
                f"starts {words[0]}: call it in this process, or mark the test with one of {sorted(PROCESSES)}"
            )
        start(process, command, *arguments, **options)

    with mock.patch.object(subprocess.Popen, "__init__", refuse_python):
        return (yield)


def run_module(*words: object, **options: object) -> subprocess.CompletedProcess:
    """Run `python -m WORDS`, and again if gloo aborted one of its processes."""

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT, **options)

    result = run()
    # a gloo process of torch 2.13 aborts at exit in one of a few dozen runs, after all its work
    return run() if "terminate called without an active exception" in result.stderr else result


WORDS = "the punter serves italian food near the river and the mill is a cheap family friendly pub in the city centre"


def build_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with an end-of-sequence and a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def family_options(width: int) -> dict[str, dict]:
    """Return the config options of each family besides the sizes that all families have."""
    plain = {"intermediate_size": 2 * width}
    grouped = {"num_key_value_heads": 1, **plain}
    windows = {"head_dim": 8, "sliding_window": 3, **grouped}  # in the Gemmas in every other layer
    soft_caps = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 4}
    return {
        "gpt2": {},
        "opt": {"ffn_dim": 2 * width, "word_embed_proj_dim": width},
        "llama": grouped,
        "mistral": windows,
        "qwen2": {"tie_word_embeddings": True, **grouped},
        "qwen3": {"head_dim": 8, **grouped},
        "gemma2": {**windows, **soft_caps},
        "gemma3": {"model_type": "gemma3_text", "sliding_window_pattern": 2, **windows},
        "gpt_neox": plain,
    }


FAMILIES = list(family_options(32))


def other_family_options(width: int) -> dict[str, dict]:
    """Return the config options of families that tests sample from and score, but do not train."""
    plain = {"intermediate_size": 2 * width}
    grouped = {"num_key_value_heads": 1, **plain}
    wide_heads = {"head_dim": 16, **grouped}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    routed = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    scales = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    return {
        "apertus": grouped,
        "bloom": {},
        "cohere": {"logit_scale": 0.25, **grouped},
        "cohere2": {"logit_scale": 0.25, "sliding_window": 4, **wide_heads},
        "deepseek_v3": {**routed, **latent, **experts, **plain, "num_key_value_heads": 2},
        "ernie4_5": wide_heads,
        "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2, **grouped},
        "falcon": {"ffn_hidden_size": 2 * width, "alibi": True},
        "gemma": wide_heads,
        "glm4": wide_heads,
        "gpt_bigcode": {},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, **plain},
        "gpt_oss": {"sliding_window": 4, **experts, **wide_heads},
        "granite": {"attention_multiplier": 0.5, **scales, **grouped},
        "granitemoe": {"attention_multiplier": 0.5, **scales, **experts, **grouped},
        "mixtral": {**experts, **grouped},
        "ministral": {"sliding_window": 4, **wide_heads},
        "mpt": {"max_seq_len": 128},
        "nemotron": grouped,
        "olmo": grouped,
        "olmo2": grouped,
        "olmo3": {"sliding_window": 4, **grouped},
        "olmoe": {**experts, **grouped},
        "phi": grouped,
        "phi3": grouped,
        "qwen2_moe": {"shared_expert_intermediate_size": width, **experts, **grouped},
        "qwen3_moe": {**experts, **wide_heads},
        "seed_oss": wide_heads,
        "smollm3": grouped,
        "stablelm": grouped,
        "starcoder2": grouped,
    }


OTHER_FAMILIES = list(other_family_options(32))


def build_model(
    family: str, vocab_size: int = 300, seed: int = 0, width: int = 32, layers: int = 2, positions: int = 128
) -> PreTrainedModel:
    """Build a model with random weights, large enough for distributions far from uniform."""
    torch.manual_seed(seed)
    options = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **(family_options(width) | other_family_options(width))[family],
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Save a model of the family with the tokenizer, once for all tests, and return its folder."""
    folders = {}

    def save(family: str = "gpt2", seed: int = 0, width: int = 32) -> str:
        key = (family, seed, width)
        if key not in folders:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}-{width}")
            tokenizer = build_tokenizer()
            build_model(family, len(tokenizer), seed, width).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[key] = str(folder)
        return folders[key]

    return save


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory) -> str:
    """Save a student of eight tokens for vLLM, and return its folder."""
    from vllm_on_cpu import save_student

    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def updatable_weights() -> Iterator[None]:
    """Let TRL update the weights of vLLM in place, as on a GPU.

    On a CPU, vLLM packs the weights of linear layers for its kernels and drops the originals, so TRL, which loads one
    parameter after another into the running model, finds no weight to load into. Without these kernels vLLM falls
    back to torch's linear layers, whose weights stay where they are.
    """
    import vllm._custom_ops as kernels
    from vllm.model_executor.layers import utils

    with (
        mock.patch.object(kernels, "_supports_onednn", False),
        mock.patch.object(utils, "check_cpu_sgl_kernel", return_value=False),
    ):
        yield
