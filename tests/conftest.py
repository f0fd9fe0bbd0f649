"""Tiny models and a tiny tokenizer, built in process: nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Of subprocesses: offline, one thread each, since tests run side by side
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

WORDS = "the punter serves italian food near the river and the mill is a cheap family friendly pub in the city centre"


def build_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end-of-sequence and a padding token."""
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


def build_model(
    family: str, vocab_size: int = 300, seed: int = 0, width: int = 32, layers: int = 2
) -> PreTrainedModel:
    """A model with random weights that are large enough for its distributions to be far from uniform."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=128, **common))
    elif family == "opt":
        config = OPTConfig(
            hidden_size=width,
            ffn_dim=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=128,
            word_embed_proj_dim=width,
            **common,
        )
        model = OPTForCausalLM(config)
    elif family in ("mistral", "gemma3"):  # sliding windows of 3 tokens, in gemma3 in every other layer
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
        if family == "mistral":
            model = MistralForCausalLM(MistralConfig(sliding_window=3, **sizes, **heads, **common))
        else:
            kinds = ["sliding_attention", "full_attention"][:layers]
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(sliding_window=3, layer_types=kinds, **sizes, **heads, **common)
            )
    else:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            **common,
        )
        model = LlamaForCausalLM(config)
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
    """Save a model of the family with the tokenizer, once for all tests; returns its folder."""
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
