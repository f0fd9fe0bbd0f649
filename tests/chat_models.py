"""A tiny tokenizer like SmolLM2's: its special tokens and its ChatML template, with a vocabulary of a few words."""

import json
from pathlib import Path

from conftest import WORDS, build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1 and 2

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_chat_tokenizer(eos: str | None = TURN_END, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Build a tokenizer like SmolLM2-Instruct's with `TURN_END` as EOS, or the base model's with `TEXT_END`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS + " user assistant system"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=TEXT_END, unk_token=TEXT_END, padding_side="left"
    )
    fast.chat_template = template
    return fast


def build_chat_model(
    tokenizer: PreTrainedTokenizerFast, ends: int | list[int] | None, seed: int = 0, width: int = 32
) -> PreTrainedModel:
    """Build a Llama with random weights and the EOS ids `ends` in its generation config."""
    model = build_model("llama", len(tokenizer), seed, width)
    model.config.eos_token_id = ends[0] if isinstance(ends, list) else ends
    model.config.bos_token_id = model.config.pad_token_id = 0
    model.generation_config.eos_token_id = ends
    model.generation_config.bos_token_id = model.generation_config.pad_token_id = 0
    return model


def save_chat_model(folder: Path, eos: str | None, ends: int | list[int] | None, **options: int) -> str:
    """Save a model with its tokenizer, and return the folder."""
    tokenizer = build_chat_tokenizer(eos)
    build_chat_model(tokenizer, ends, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_small_smollm2(folder: Path) -> Path:
    """Save a model with as many layers and channels as SmolLM2-135M, whose tokenizer pads with its end token too."""
    tokenizer = build_chat_tokenizer(TURN_END)
    tokenizer.pad_token = TURN_END
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_small_dolly(folder: Path, rows: int) -> Path:
    """Write rows in the form of Dolly without context, and return the file."""
    path = folder / "databricks-dolly-15k.jsonl"
    values = [
        {"instruction": f"say {row}", "context": "", "response": f"{row} it is", "category": "open_qa"}
        for row in range(rows)
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def question(text: str) -> list[dict[str, str]]:
    """Return a conversation with one message."""
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict[str, str]]:
    """Return a completion with one message."""
    return [{"role": "assistant", "content": text}]
