"""Model families, and the ways to train them: scores, a training step and what it leaves on disk.

How each of the trained families samples is in `test_sampling.py`.
"""

import copy
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import FAMILIES, OTHER_FAMILIES, build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.errors import UserError
from minillm_trl.models.bitsandbytes_layout import keep_4bit_layout
from minillm_trl.models.context import max_context
from minillm_trl.models.fused_head import ScoreRequest, add_scoring
from minillm_trl.models.lm_head import LMHead, check_head, completion_hidden_states
from minillm_trl.rollouts.buffer import sequences
from minillm_trl.rollouts.decoding import check_decoding
from minillm_trl.rollouts.sampling import Completions, sample_prompts

TOKENIZER = build_tokenizer()
TOKENIZER.add_tokens("<|endoftext|>", special_tokens=True)  # loaded as Qwen2's, a tokenizer has it in any case
VOCAB = len(TOKENIZER)
PROMPTS = Dataset.from_dict({"prompt": [f"the punter {'near the river ' * (i % 4)}{i}\n" for i in range(8)]})
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
WAYS: dict[str, dict] = {
    "full": {},
    "LoRA": {"peft_config": LoraConfig(**LORA)},
    "DoRA": {"peft_config": LoraConfig(**LORA, use_dora=True)},
    "QLoRA": {"peft_config": LoraConfig(**LORA), "quantization_config": NF4},
    "NF4 teacher": {"teacher_model_init_kwargs": {"quantization_config": NF4}},
}
IDS = torch.arange(2, 14).view(2, 6)


def build(family: str, vocab_size: int = VOCAB, seed: int = 0, width: int = 32) -> PreTrainedModel:
    """A model that has its biases and norms: at zero and one they could as well be missing."""
    model = build_model(family, vocab_size, seed, width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_trainer(output: Path, student, teacher, **options) -> MiniLLMTrainer:
    arguments = {name: options.pop(name) for name in ("peft_config", "quantization_config") if name in options}
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,  # an adapter that starts at zero moves all of its weights in the second update only
        "max_steps": 2,
        "max_completion_length": 10,
        "teacher_mixed_alpha": 0.4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = MiniLLMConfig(str(output), **{**defaults, **options})
    return MiniLLMTrainer(
        student, teacher, args=args, train_dataset=PROMPTS, processing_class=TOKENIZER, **copy.deepcopy(arguments)
    )


def score_alone(model: PreTrainedModel, prompt: torch.Tensor, completion: torch.Tensor, temperature: float = 1.0):
    """Log-probs `(T, V)` of the next token in one completion, from a plain forward pass without padding."""
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum(dim=-1)


@pytest.mark.parametrize("family", FAMILIES + OTHER_FAMILIES)
def test_scores_and_their_gradient_are_those_of_each_row_alone(family: str):
    student, teacher = build(family), build(family, seed=1, width=48)
    rows = [([5, 6, 7, 8, 9], [10, 11, 12]), ([13], [14, 15, 16, 17]), ([18, 19, 20], [21])]
    width, length = 6, 5  # more than any row has
    ids, mask = torch.ones(3, width + length, dtype=torch.long), torch.zeros(3, width + length, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        real = slice(width - len(prompt), width + len(completion))
        ids[row, real], mask[row, real] = torch.tensor(prompt + completion), 1
    temperature, kd_temperature = 1.3, 0.7
    expected = []
    for prompt, completion in (map(torch.tensor, row) for row in rows):
        log_probs = score_alone(student, prompt, completion, temperature)
        with torch.no_grad():
            target = score_alone(teacher, prompt, completion, kd_temperature)
        divergence = kl(score_alone(student, prompt, completion, kd_temperature), target)
        logps = log_probs.gather(1, completion[:, None]).squeeze(1)
        expected.append(torch.stack([logps, -(log_probs.exp() * log_probs).sum(dim=-1), divergence]))
    expected = torch.cat(expected, dim=1)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad((2 * expected[2] - expected[0]).sum(), parameters)

    add_scoring(student, VOCAB, LMHead.of(teacher))
    with torch.no_grad():
        states = completion_hidden_states(teacher, ids, mask, length)
    request = ScoreRequest(ids, mask, mask[:, -length:].bool(), temperature, states, kd_temperature)
    (scores,) = student(score_requests=[request._replace(loss=lambda token, _: 2 * token.divergence - token.logps)])
    found = torch.stack(scores[:3])
    torch.testing.assert_close(found[:, request.completion_mask], expected.detach(), rtol=1e-4, atol=1e-5)
    assert not found[:, ~request.completion_mask].any()
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for actual, gradient in zip(torch.autograd.grad(scores.loss, parameters), gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-6 * largest)


@torch.no_grad()
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_family_passes_the_checks_and_leaves_the_states_of_a_plain_forward_pass(family: str):
    models = build(family, 60), build(family, 60, seed=1)
    for model in models:
        check_head(model, "model")
        check_decoding(model, "model")
    prompts = [[5 + row, *range(6, 6 + (3 * row) % 11)] for row in range(6)]
    batches: list[tuple[list[int], Completions]] = []
    completions = sample_prompts(
        models[0],
        prompts,
        keys=[(7, row) for row in range(6)],
        max_new_tokens=20,
        eos_token_ids=[0, 3, 9],
        pad_token_id=1,
        batch_size=4,
        teacher=models[1],
        alpha=0.3,
        shared_coins=False,
        keep_states=True,
        on_batch=lambda rows, sampled: batches.append((rows, sampled)),
    )
    for rows, sampled in batches:
        for number, row in enumerate(rows):
            ids = torch.tensor([prompts[row] + completions[row]])
            for model, states in zip(models, sampled[2:], strict=True):
                expected = model.base_model(ids).last_hidden_state[0, len(prompts[row]) - 1 : -1]
                found = states[number, : len(completions[row])]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_longrope_is_refused_where_a_sequence_may_cross_its_original_length(tmp_path):
    """Beyond it all positions of a batch are rotated otherwise, also those that are in the cache."""
    models = [build("phi3", seed=seed) for seed in (0, 1)]
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    models[0].config.rope_parameters = {**parameters, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    assert max_context(models[1]) == 128
    prompts = {"prompt_ids": [[5], [5] * 5], "keys": None, "eos_token_ids": [], "pad_token_id": 1}
    assert len(sample_prompts(models[0], **prompts, max_new_tokens=19)[1]) == 19
    with pytest.raises(UserError, match=r"A prompt of 5 tokens and max_new_tokens=20 cross .*=24 of Phi3ForCausalLM"):
        sample_prompts(models[1], **prompts, max_new_tokens=20, teacher=models[0], alpha=0.1)
    trainer = make_trainer(tmp_path, *models, max_completion_length=20)
    with pytest.raises(
        UserError, match=r"exceed the models' original_max_position_embeddings \(.*LongRoPE.*\) of 24\."
    ):
        trainer.train()


def test_architecture_that_does_not_name_its_body_is_refused():
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    options |= {"vocab_size": 60, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2}
    llama4 = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **options, pad_token_id=1))
    with pytest.raises(UserError, match=r"\(Llama4ForCausalLM\) cannot be run without its LM head"):
        check_head(llama4, "student")


class Run(NamedTuple):
    """A training run that has ended and is saved, the weights that it started from, and where its models came from."""

    trainer: MiniLLMTrainer
    has_adapter: bool
    student_before: dict[str, torch.Tensor]
    teacher_before: dict[str, torch.Tensor]
    load_student: Callable[[], PreTrainedModel]
    load_teacher: Callable[[], PreTrainedModel]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}


def loader(folder: Path, quantization_config: BitsAndBytesConfig | None) -> Callable[[], PreTrainedModel]:
    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config)
        keep_4bit_layout(model)
        return model.eval()

    return load


@pytest.fixture(scope="module", params=product(FAMILIES, WAYS), ids="-".join)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    family, way = request.param
    student, teacher, output = (tmp_path_factory.mktemp(name) for name in ("student", "teacher", "output"))
    for folder, seed, width in ((student, 0, 32), (teacher, 1, 48)):
        build(family, seed=seed, width=width).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    trainer = make_trainer(output, str(student), str(teacher), **WAYS[way])
    before = weights(trainer.model), weights(trainer.teacher_model)
    trainer.train()
    trainer.save_model()
    student_nf4, teacher_nf4 = (NF4 if way == nf4_way else None for nf4_way in ("QLoRA", "NF4 teacher"))
    has_adapter = "peft_config" in WAYS[way]
    return Run(trainer, has_adapter, *before, loader(student, student_nf4), loader(teacher, teacher_nf4))


class TestTrainedStudent:
    def test_all_of_it_has_moved_and_nothing_else(self, run: Run):
        after, teacher_after = weights(run.trainer.model), weights(run.trainer.teacher_model)
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, run.student_before[name])}
        names = dict(run.trainer.model.named_parameters(remove_duplicate=False))
        assert moved == {name for name in names if "lora_" in name or not run.has_adapter}
        assert moved == {name for name, parameter in names.items() if parameter.requires_grad}
        assert not any(parameter.requires_grad for parameter in run.trainer.teacher_model.parameters())
        assert all(torch.equal(tensor, run.teacher_before[name]) for name, tensor in teacher_after.items())

    def test_each_model_is_quantised_where_it_was_asked_for(self, run: Run):
        loaded = run.load_student(), run.load_teacher()
        for model, expected in zip((run.trainer.model, run.trainer.teacher_model), loaded, strict=True):
            layers = [
                sum(isinstance(module, Linear4bit) for module in loaded.modules()) for loaded in (model, expected)
            ]
            assert layers[0] == layers[1]
            assert bool(layers[0]) == (getattr(expected, "quantization_method", None) is not None)

    @torch.no_grad()
    def test_what_was_logged_is_of_the_models_on_disk(self, run: Run):
        student, teacher = run.load_student(), run.load_teacher()
        (batch,) = run.trainer.buffer.batches  # whose first update is that of an adapter at zero
        mask = sequences(batch)[2]
        divergences, entropies = [], []
        for row, real in enumerate(mask):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            completion = batch["completion_ids"][row][real]
            q, p = (score_alone(model, prompt, completion) for model in (student, teacher))
            divergences.append(kl(q, p))
            entropies.append(-(q.exp() * q).sum(dim=-1))
            logps, teacher_logps = (log_probs.gather(1, completion[:, None]).squeeze(1) for log_probs in (q, p))
            mixture = (0.6 * logps.exp() + 0.4 * teacher_logps.exp()).log()
            torch.testing.assert_close(batch["student_logps"][row][real], logps, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(batch["old_per_token_logps"][row][real], mixture, rtol=1e-4, atol=1e-4)
        first, second, *_ = run.trainer.state.log_history
        reverse_kl = torch.stack([divergence.sum() for divergence in divergences]).mean().item()
        assert first["objective/reverse_kl"] == pytest.approx(reverse_kl, rel=1e-3)
        assert first["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
        assert math.isfinite(first["loss"])
        assert second["loss"] < first["loss"]

    @torch.no_grad()
    def test_dropout_was_off(self, run: Run):
        model = run.trainer.model.train()
        assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)

    @torch.no_grad()
    def test_it_is_loaded_as_it_was_saved(self, run: Run):
        model, output = run.trainer.model.eval(), Path(run.trainer.args.output_dir)
        saved = {path.name for path in output.glob("*model*")}
        if run.has_adapter:
            assert saved == {"adapter_model.safetensors"}
            assert all("lora_" in name for name in load_file(output / "adapter_model.safetensors"))
            for parameter in model.parameters():  # to what they are loaded as
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            loaded = PeftModel.from_pretrained(run.load_student(), output)
        else:
            assert saved == {"model.safetensors"}
            loaded = AutoModelForCausalLM.from_pretrained(output)
        logits = model(IDS).logits
        torch.testing.assert_close(loaded.eval()(IDS).logits, logits, rtol=1e-5, atol=1e-5)
        assert (run.load_student()(IDS).logits - logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows"), [(8, 3), (3, 8)], ids=["student's larger", "teacher's larger"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_vocabularies_train_like_those_cut_to_the_rows_they_share(
    tmp_path, family: str, student_rows: int, teacher_rows: int
):
    shared = VOCAB + 3
    padded = build(family, VOCAB + student_rows), build(family, VOCAB + teacher_rows, seed=1, width=48)
    with torch.no_grad():  # where they may be sampled, most of the tokens are among them
        for model in padded:
            model.get_output_embeddings().weight[shared:] *= 20.0
    cut = copy.deepcopy(padded)
    moved = []
    for student, teacher in (padded, cut):
        if student is cut[0]:
            for model in cut:
                model.resize_token_embeddings(shared)
        trainer = make_trainer(tmp_path, student, teacher, optim="sgd", learning_rate=0.1)
        assert trainer.vocab_size == shared
        before = weights(student)
        trainer.train()
        (batch,) = trainer.buffer.batches
        assert batch["completion_ids"].max() < shared
        moved.append({name: tensor - before[name] for name, tensor in weights(student).items()})
    for name, expected in moved[1].items():
        actual = moved[0][name]
        assert not actual[len(expected) :].any()
        torch.testing.assert_close(actual[: len(expected)], expected, rtol=1e-3, atol=1e-6)
    assert moved[1][next(iter(moved[1]))].abs().max() > 1e-3


def test_page_lists_what_is_run_here():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    header, *trained = (line for line in lines if len(line) == 2 + len(WAYS) and "---" not in line[0])
    assert header[2:] == list(WAYS)
    assert [row[0].strip("`") for row in trained] == FAMILIES
    assert all(cell == "CPU" for row in trained for cell in row[2:])
    _, *scored = (line for line in lines if len(line) == 2 and "---" not in line[0])
    assert [row[0].strip("`") for row in scored] == OTHER_FAMILIES
