"""Short runs with every option of the loss away from its default, and a recording of their steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from slow_reference import Row
from transformers import PreTrainedModel, TrainerCallback

from minillm_trl import MiniLLMConfig, MiniLLMTrainer

PROMPTS = [f"the punter {'near the river ' * (i % 3)}{i}\n" for i in range(24)]
ENDS = list(range(0, 300, 9))  # so many that completions have all lengths
STUDENT_ROWS, TEACHER_ROWS = 310, 304  # of the vocabulary; the tokenizer has 300
ROWS_OF_A_STEP, STEPS_OF_A_PASS, MAX_LENGTH = 8, 2, 10
LM_ROWS = 3  # of a micro-batch
LEARNING_RATE = 0.03


def token_sum(completion: Sequence[int]) -> float:
    return sum(completion) % 64 / 16


def length(completion: Sequence[int]) -> float:
    return len(completion) / 4


def over_rows(function):
    """Make a reward function of TRL from a function of a single completion."""

    def reward(completion_ids, **unused):
        return [function(completion) for completion in completion_ids]

    reward.__name__ = function.__name__
    return reward


def written_completion(prompt: str) -> tuple[list[int], list[float], list[int]]:
    """Return a rollout function's tokens, log-probs of the policy that sampled, and mask of model tokens."""
    number = PROMPTS.index(prompt)
    size = 2 + number % (MAX_LENGTH - 1)
    ids = [1 + (5 * number + 7 * t) % 299 for t in range(size)]
    logps = [-(24 + (3 * number + 5 * t) % 32) / 8 for t in range(size)]  # exact in float32 too
    return ids, logps, [int(t % 4 != 1) for t in range(size)]


def write_rollout(prompts: list[str], trainer: MiniLLMTrainer) -> dict:
    ids, logps, masks = zip(*map(written_completion, prompts), strict=True)
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": [*ids], "logprobs": [*logps], "env_mask": [*masks]}


COMMON = {
    "temperature": 0.8,
    "kd_temperature": 1.5,
    "gamma": 0.8,
    "reward_scale": 0.5,
    "reward_clip": 1.5,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "delta": 1.35,
    "beta": 0.3,
    "teacher_mixed_alpha": 0.4,
    "lm_coef": 0.6,
    "lm_kd_ratio": 0.3,
    "lm_max_length": 9,
    "sampling_batch_size": 3,
    "num_iterations": 2,
    "max_completion_length": MAX_LENGTH,
}


@dataclass(frozen=True)
class Case:
    """A setting of the options.

    Attributes:
        options: in addition to `COMMON`.
        reward_funcs: functions of one completion.
        texts: whether the corpus of L_PT is plain text, and not pairs.
        rollout_func: whether completions are written by `write_rollout` instead of sampled.
        idle: options that have no effect given the others of the case.
    """

    options: dict
    reward_funcs: tuple = ()
    texts: bool = False
    rollout_func: bool = False
    idle: tuple[str, ...] = ()

    @property
    def all_options(self) -> dict:
        return {**COMMON, **self.options}


CASES = {
    "token": Case(
        {
            "importance_weighting": "token",
            "include_current_reward": True,
            "reward_estimator": "expected",
            "discounted_length": False,
            "whiten_advantages": "tokens",
            "loss_reduction": "sequence_sum",
            "num_generations": 2,
            "reward_weights": [0.5, 2.0],
            "scale_rewards": "batch",
            "teacher_hidden_states": "cpu",
        },
        (token_sum, length),
        idle=("max_completion_length",),
    ),
    "decoupled": Case(
        {
            "importance_weighting": "decoupled",
            "importance_weight_cap": 1.2,
            "single_step_divergence": "trust_region_kl",
            "length_normalization": False,
            "whiten_advantages": "padding",
            "use_bias_correction_kl": False,
            "num_iterations": 3,
            "shared_coins": False,
            "reward_weights": [0.5, 2.0],
            "scale_rewards": "none",
            "teacher_hidden_states": "recompute",
        },
        (token_sum, length),
        texts=True,
        idle=("discounted_length", "lm_max_length"),
    ),
    "prefix": Case(
        {
            "importance_weighting": "prefix",
            "importance_weight_cap": 1.4,
            "single_step_divergence": "skewed_forward_kl",
            "skew_alpha": 0.3,
            "loss_reduction": "sequence_sum",
            "advantage_baseline": "group",
            "num_generations": 2,
            "shared_coins": False,
            "reward_weights": [0.5, 2.0],
            "multi_objective_aggregation": "normalize_then_sum",
        },
        (token_sum, length),
        idle=("max_completion_length", "scale_rewards"),
    ),
    "sequence": Case(
        {
            **{"importance_weighting": "sequence", "importance_weight_cap": 1.4, "discounted_length": False},
            **{"reward_estimator": "expected", "advantage_baseline": "position", "shared_coins": False},
        },
        idle=("max_completion_length", "scale_rewards"),
    ),
    "generalized JSD": Case(
        {
            **{"single_step_divergence": "generalized_jsd", "jsd_beta": 0.2, "loss_reduction": "sequence_sum"},
            **{"iw_opd_gamma": 0.5, "top_entropy_quantile": 0.6},
        },
        idle=("epsilon", "max_completion_length", "scale_rewards"),
    ),
    "overlapped rollouts": Case(
        {
            **{"overlap_rollouts": True, "lm_kd_ratio": 0.0, "importance_weighting": "decoupled"},
            **{"importance_weight_cap": 1.3, "reward_estimator": "expected", "advantage_baseline": "position"},
            **{"top_entropy_quantile": 0.6, "sampling_batch_size": 5},
        },
        idle=("max_completion_length", "scale_rewards"),
    ),
    "rewards without the long term": Case(
        {
            **{"rkl_advantage": False, "num_generations": 2},
            **{"single_step_divergence": "entropy_aware_kl", "teacher_entropy_threshold": 4.0},
        },
        (length,),
        texts=True,
        idle=(
            *("gamma", "include_current_reward", "length_normalization", "discounted_length"),
            *("reward_scale", "reward_clip", "whiten_advantages", "max_completion_length", "lm_max_length"),
        ),
    ),
    "no single step": Case(
        {"single_step_decomposition": False, "include_current_reward": False, "loss_reduction": "sequence_sum"},
        idle=("max_completion_length", "scale_rewards"),
    ),
    "rollout function": Case(
        {
            "importance_weighting": "prefix",
            "importance_weight_cap": 1.5,
            "single_step_divergence": "mixed_kl",
            "forward_kl_share": 0.3,
            "teacher_mixed_alpha": 0.2,
            "whiten_advantages": "padding",
            "max_completion_length": MAX_LENGTH + 4,  # longer than the longest of the buffer
        },
        rollout_func=True,
        idle=("scale_rewards",),
    ),
}


@dataclass
class Recording:
    """A record of one process: rows by optimizer step and of the evaluation, all weights, and the logs."""

    steps: list[list[Row]] = field(default_factory=list)
    evaluation: list[Row] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)


class RecordedTrainer(MiniLLMTrainer):
    recording: Recording

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = rows_of(inputs)
        if not self.model.training:
            self.recording.evaluation += rows
        elif self.state.global_step == len(self.recording.steps):
            self.recording.steps.append(rows)
        else:  # a further micro-batch
            self.recording.steps[-1] += rows
        return super().compute_loss(model, inputs, *args, **kwargs)


class RecordWeights(TrainerCallback):
    def __init__(self, recording: Recording):
        self.recording = recording

    def on_step_end(self, args, state, control, model, **unused):
        self.recording.weights.append(flat_weights(model))


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def rows_of(inputs: dict[str, torch.Tensor]) -> list[Row]:
    """Return only the tokens of a batch."""
    rows = []
    for name in ("prompt", "completion"):
        ids, mask = inputs[f"{name}_ids"], inputs[f"{name}_mask"].bool()
        rows.append([tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)])
    return [Row(prompt, completion, (True,) * len(completion)) for prompt, completion in zip(*rows, strict=True)]


def written_rows() -> dict[tuple[int, ...], Row]:
    """Return the rollout function's output for each prompt, by the prompt's tokens."""
    rows, tokenizer = {}, build_tokenizer()
    for prompt in PROMPTS:
        ids, logps, mask = written_completion(prompt)
        tokens = tuple(tokenizer(prompt)["input_ids"])
        rows[tokens] = Row(tokens, tuple(ids), tuple(map(bool, mask)), tuple(logps))
    return rows


def build_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    student = build_model("gpt2", STUDENT_ROWS, 0, width=16, layers=1).double()
    teacher = build_model("gpt2", TEACHER_ROWS, 1, width=24, layers=1).double()
    with torch.no_grad():  # further from uniform
        for model in (student, teacher):
            model.get_output_embeddings().weight.mul_(5.0)
    student.generation_config.eos_token_id = ENDS
    return student, teacher


def corpus(texts: bool, num_rows: int) -> tuple[Dataset, list[Row]]:
    """Return a corpus that one optimizer step reads completely, in any order, and its `num_rows` sequences."""
    tokenizer = build_tokenizer()
    end, most = tokenizer.eos_token_id, COMMON["lm_max_length"]
    if not texts:
        pairs = [(f"the mill {i}", " is a cheap pub" * (1 + i % 3)) for i in range(num_rows)]
        rows = [[tuple(tokenizer(text)["input_ids"]) for text in pair] for pair in pairs]
        rows = [Row(prompt, (*completion, end), (True,) * (len(completion) + 1)) for prompt, completion in rows]
        return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]}), rows
    joined, lines = [], []
    while -(-len(joined) // most) < num_rows:
        lines.append(f"the mill {len(lines)}")
        joined += [*tokenizer(lines[-1])["input_ids"], end]
    blocks = [tuple(joined[start : start + most]) for start in range(0, len(joined), most)]
    # the first token of a block is predicted from nothing
    rows = [Row(block[:1], block[1:], (True,) * (len(block) - 1)) for block in blocks]
    return Dataset.from_dict({"text": lines}), rows


def record(case: Case, folder: Path, num_processes: int) -> Recording:
    """Train on `num_processes` processes, of which this is one, with the student in `folder`."""
    batch_size, accumulation = ROWS_OF_A_STEP // 2 // num_processes, 2
    args = MiniLLMConfig(
        str(folder / "output"),
        model_init_kwargs={"dtype": "auto"},
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=ROWS_OF_A_STEP // num_processes,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=STEPS_OF_A_PASS * accumulation,
        gradient_checkpointing=False,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=2 * STEPS_OF_A_PASS * case.all_options["num_iterations"],  # two rollouts
        logging_steps=1,
        save_strategy="no",
        lm_batch_size=LM_ROWS,
        **case.all_options,
    )
    trainer = RecordedTrainer(
        str(folder),
        build_models()[1],
        reward_funcs=list(map(over_rows, case.reward_funcs)) or None,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[: ROWS_OF_A_STEP // args.num_generations]}),
        processing_class=build_tokenizer(),
        lm_dataset=corpus(case.texts, LM_ROWS * accumulation * num_processes)[0],
        rollout_func=write_rollout if case.rollout_func else None,
    )
    trainer.recording = Recording()
    trainer.add_callback(RecordWeights(trainer.recording))
    trainer.train()
    trainer.evaluate()
    trainer.recording.history = trainer.state.log_history
    return trainer.recording
