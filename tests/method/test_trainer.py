"""Training runs: what is logged, what stays the same however a step is cut into micro-batches, what is refused."""

import copy
import inspect
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.grpo_trainer
import trl.trainer.utils
from conftest import WORDS, build_model, build_tokenizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM, ProcessorMixin, TrainerCallback
from trl import GRPOConfig
from trl.kernels import chunked_divergence, chunked_logprob

import minillm_trl.rollouts.rollout_sampler
import minillm_trl.training.checks
from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.errors import UserError
from minillm_trl.hardware.machine import GPU, Machine
from minillm_trl.rollouts.keyed_random import EVAL_TOKENS, TRAIN_TOKENS
from minillm_trl.rollouts.sampling import sample_prompts
from minillm_trl.training.checks import check_machine, check_model

PROMPTS = [f"the punter {'near the river ' * (i % 4)}{i}\n" for i in range(32)]
DATASET = Dataset.from_dict({"prompt": PROMPTS, "references": [["cheap food", "italian food"]] * len(PROMPTS)})


def make_config(tmp_path, **options) -> MiniLLMConfig:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_completion_length": 12,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return MiniLLMConfig(str(tmp_path), **{**defaults, **options})


def make_trainer(tmp_path, *, family: str = "gpt2", student=None, teacher=None, dataset=DATASET, **options):
    trainer_options = {
        key: options.pop(key)
        for key in ("reward_funcs", "peft_config", "eval_dataset", "lm_dataset", "rollout_func", "tools")
        if key in options
    }
    tokenizer = build_tokenizer()
    return MiniLLMTrainer(
        student or build_model(family, len(tokenizer), 0),
        teacher or build_model(family, len(tokenizer), 1, width=48),
        args=make_config(tmp_path, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        **trainer_options,
    )


def lora_on_head():
    return get_peft_model(build_model("llama"), LoraConfig(target_modules=["lm_head"]))


def weights(trainer: MiniLLMTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


METRICS = [
    "completions/mean_length",
    "rollout/eos_rate",
    "rollout/repeated_4grams",
    "objective/long_term",
    "objective/single_step",
    "objective/reverse_kl",
    "objective/reverse_kl_per_token",
    "objective/advantage",
    "entropy",
    "clip_ratio/mixing",
    "clip_ratio/drift",
    "importance_weight/mean",
    "importance_weight/max",
    "importance_weight/effective_sample_size",
]


class TestTraining:
    def test_reverse_kl_falls_over_several_passes_with_mixing(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=60, num_iterations=3, learning_rate=3e-3, steps_per_generation=4)
        trainer.train()
        kl = [
            entry["objective/single_step"] for entry in trainer.state.log_history if "objective/single_step" in entry
        ]
        assert sum(kl[-5:]) < 0.8 * sum(kl[:5])

    @pytest.mark.parametrize(
        "options",
        [{}, {"bf16": True}, {"bf16": True, "half_precision_rollouts": True}, {"peft_config": LoraConfig(r=2)}],
        ids=["float32", "autocast", "rollout copy", "LoRA"],
    )
    def test_snapshot_of_the_model_keeps_the_weights_of_its_time(self, tmp_path, options: dict):
        """Of moving averages and best-so-far copies."""
        ids, snapshots = torch.tensor([[5, 6, 7, 8]]), []

        class Snapshot(TrainerCallback):
            def on_step_end(self, args, state, control, model, **unused):
                snapshot = copy.deepcopy(model).eval()
                snapshots.append((snapshot, snapshot(ids).logits))

        trainer = make_trainer(tmp_path, max_steps=2, **options)
        trainer.add_callback(Snapshot())
        trainer.train()
        (first, before), (last, _) = snapshots
        assert torch.equal(first(ids).logits, before)
        live = trainer.model.eval()(ids).logits
        assert torch.equal(last(ids).logits, live)
        assert (before - live).abs().max() > 1e-3

    def test_every_metric_is_logged_in_training_and_evaluation(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_dataset=DATASET.select(range(8)), eval_strategy="steps", eval_steps=2)
        trainer.train()
        logged = set().union(*trainer.state.log_history)
        assert {*METRICS, *(f"eval_{name}" for name in METRICS), "eval_rouge_l", "eval_loss"} <= logged
        assert "reward" not in logged
        first = trainer.state.log_history[0]
        assert first["importance_weight/mean"] == pytest.approx(1.0, abs=0.1)
        assert first["clip_ratio/drift"] == 0.0  # the student has not moved yet
        assert first["clip_ratio/mixing"] > 0.0
        assert first["objective/long_term"] + first["objective/single_step"] == pytest.approx(first["loss"], abs=1e-4)

    def test_evaluation_is_a_mean_over_prompts_whatever_the_batch(self, tmp_path):
        found, data = [], Dataset.from_dict({"prompt": PROMPTS[:5], "references": [[WORDS]] * 5})
        for batch_size in (5, 3, 2):  # the last batch has fewer prompts
            options = {"eval_dataset": data, "per_device_eval_batch_size": batch_size, "max_completion_length": 40}
            trainer = make_trainer(tmp_path, **options)
            found.append(trainer.evaluate())
        names = [f"eval_{name}" for name in METRICS] + ["eval_rouge_l"]
        assert found[0]["eval_rouge_l"] > 0
        for other in found[1:]:
            assert {name: other[name] for name in names} == pytest.approx(
                {name: found[0][name] for name in names}, rel=1e-5
            )

    def test_evaluation_samples_from_the_student_alone(self, tmp_path, monkeypatch: pytest.MonkeyPatch):
        calls = []

        def recorded(*args, **kwargs):
            calls.append((kwargs["keys"][0][1], kwargs["alpha"]))
            return sample_prompts(*args, **kwargs)

        monkeypatch.setattr(minillm_trl.rollouts.rollout_sampler, "sample_prompts", recorded)
        trainer = make_trainer(tmp_path, eval_dataset=DATASET.select(range(8)), eval_strategy="steps", eval_steps=2)
        trainer.train()
        assert set(calls) == {(TRAIN_TOKENS, 0.2), (EVAL_TOKENS, 0.0)}

    def test_kernels_of_trl_are_never_called(self, tmp_path, model_dir, monkeypatch: pytest.MonkeyPatch):
        """They run Triton on every CUDA device, V100s included."""

        def refuse(*args, **kwargs):
            raise AssertionError("a kernel of TRL was called")

        kernels = [chunked_divergence, chunked_logprob]  # the third can only be imported where Triton is
        own = {id(each) for module in kernels for each in vars(module).values() if inspect.isfunction(each)}
        users = [trl.trainer.utils, trl.trainer.grpo_trainer]
        patched = [
            monkeypatch.setattr(module, name, refuse)
            for module in (*kernels, *users)
            for name, each in list(vars(module).items())
            if id(each) in own
        ]
        assert len(patched) > len(kernels)
        trainer = make_trainer(
            tmp_path,
            student=model_dir("gpt2"),
            beta=0.1,
            eval_dataset=DATASET.select(range(8)),
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()

    def test_evaluation_does_not_change_training(self, tmp_path):
        plain = make_trainer(tmp_path)
        plain.train()
        evaluated = make_trainer(tmp_path, eval_dataset=DATASET.select(range(8)), eval_strategy="steps", eval_steps=1)
        evaluated.train()
        assert torch.equal(weights(plain), weights(evaluated))

    def test_teacher_is_frozen_and_unchanged(self, tmp_path):
        trainer = make_trainer(tmp_path)
        before = [parameter.clone() for parameter in trainer.teacher_model.parameters()]
        trainer.train()
        assert not trainer.teacher_model.training
        assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())
        assert all(map(torch.equal, before, trainer.teacher_model.parameters()))

    def test_lora_student_trains_its_adapter_alone(self, tmp_path):
        trainer = make_trainer(tmp_path, peft_config=LoraConfig(target_modules=["c_attn"], r=4), num_iterations=2)
        before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        changed = {
            name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
        }
        assert changed
        assert all("lora" in name for name in changed)

    def test_gradient_checkpointing_leaves_the_weights_as_they_are_without(self, tmp_path):
        plain, checkpointed = make_trainer(tmp_path), make_trainer(tmp_path, gradient_checkpointing=True)
        plain.train()
        checkpointed.train()
        torch.testing.assert_close(weights(checkpointed), weights(plain), rtol=0, atol=1e-5)

    def test_reward_functions_add_their_advantage_to_every_token(self, tmp_path):
        def short(completion_ids, **kwargs):
            return [-float(len(ids)) for ids in completion_ids]

        trainer = make_trainer(tmp_path, reward_funcs=short, num_generations=4, rkl_advantage=False, max_steps=1)
        batch = trainer._generate_and_score_completions([{"prompt": PROMPTS[0]}] * 4)
        advantage = batch["advantages"]
        lengths = batch["completion_mask"].sum(1).float()
        assert (advantage == advantage[:, :1]).all()
        if lengths.std() > 0:
            assert torch.corrcoef(torch.stack([advantage[:, 0], lengths]))[0, 1] < -0.99

    def test_run_resumed_between_two_rollouts_reaches_the_same_weights(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "num_iterations": 2}
        whole = make_trainer(tmp_path, **options)
        whole.train()
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert torch.equal(weights(resumed), weights(whole))

    def test_checkpoint_comes_with_a_model_card_that_cites_the_paper(self, tmp_path):
        make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
        card = (tmp_path / "README.md").read_text()
        assert "MiniLLM" in card
        assert "gu2024minillm" in card

    def test_each_prompt_may_have_several_completions(self, tmp_path):
        trainer = make_trainer(tmp_path, num_generations=4, max_steps=1)
        batch = trainer._generate_and_score_completions([{"prompt": PROMPTS[0]}] * 4)
        assert len({tuple(row) for row in batch["completion_ids"].tolist()}) > 1

    def test_completions_of_a_prompt_differ_in_evaluation_too(self, tmp_path):
        trainer = make_trainer(tmp_path, num_generations_eval=4, per_device_eval_batch_size=8)
        trainer.model.eval()
        prompts = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)]
        completions = trainer._generate_and_score_completions(prompts)["completion_ids"].tolist()
        assert len(set(map(tuple, completions))) == 8

    def test_prompts_come_in_another_order_in_each_epoch(self, tmp_path):
        seen = []

        def rollout(prompts, trainer):
            seen.append(prompts)
            ids = trainer.processing_class(prompts)["input_ids"]
            return {"prompt_ids": ids, "completion_ids": [[8, 9, 0]] * len(ids), "logprobs": None}

        data = DATASET.select(range(8))  # as many as a rollout has
        make_trainer(tmp_path, dataset=data, rollout_func=rollout, max_steps=6).train()
        assert [sorted(prompts) for prompts in seen] == [sorted(PROMPTS[:8])] * 3
        assert len(set(map(tuple, seen))) == 3

    def test_outside_training_a_batch_is_one_step_whatever_the_accumulation(self, tmp_path):
        losses = {}
        for reduction, accumulation in product(("token_mean", "sequence_sum"), (1, 2)):
            trainer = make_trainer(tmp_path, loss_reduction=reduction, gradient_accumulation_steps=accumulation)
            ids = torch.tensor([[8, 9, 10, 0], [8, 0, 1, 1], [11, 12, 0, 1]])
            prompts = torch.full((3, 2), 7), torch.ones(3, 2, dtype=torch.long)
            batch = trainer.score_rollouts(*prompts, ids, (ids != 1).long())
            losses[reduction, accumulation] = trainer.compute_loss(trainer.model, batch).item()
        assert losses["token_mean", 2] == losses["token_mean", 1]
        assert losses["sequence_sum", 2] == losses["sequence_sum", 1]
        assert losses["sequence_sum", 1] == pytest.approx(losses["token_mean", 1] * 9 / 3, rel=1e-5)


class TestBuffer:
    def test_buffered_batches_are_not_written_to(self, tmp_path):
        trainer = make_trainer(tmp_path, num_iterations=3, max_steps=2)
        trainer.train()
        before = [{key: value.clone() for key, value in batch.items()} for batch in trainer.buffer.batches]
        trainer.model.train()
        for batch in trainer.buffer.batches:
            trainer.compute_loss(trainer.model, batch).backward()
        for batch, kept in zip(trainer.buffer.batches, before, strict=True):
            assert batch.keys() == kept.keys()
            assert all(torch.equal(batch[key], kept[key]) for key in kept)

    def test_rows_are_known_by_the_number_of_their_prompt(self, tmp_path):
        """By which messages name them."""
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.train()
        tokenizer = trainer.processing_class
        for batch in trainer.buffer.batches:
            for ids, mask, number in zip(
                batch["prompt_ids"], batch["prompt_mask"], batch["prompt_index"], strict=True
            ):
                assert tokenizer.decode(ids[mask.bool()]) == PROMPTS[number]


class TestForwardPasses:
    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_nothing_runs_to_score_but_a_teacher_that_has_not_sampled(self, tmp_path, alpha: float):
        trainer = make_trainer(
            tmp_path, num_iterations=3, steps_per_generation=2, max_steps=6, teacher_mixed_alpha=alpha
        )
        rows = {"student": 0, "teacher": 0}

        def count(name):
            def hook(module, args, kwargs):
                if not kwargs.get("use_cache"):  # decoding passes have a cache
                    rows[name] += kwargs["input_ids"].shape[0]

            return hook

        trainer.model.base_model.register_forward_pre_hook(count("student"), with_kwargs=True)
        trainer.teacher_model.base_model.register_forward_pre_hook(count("teacher"), with_kwargs=True)
        trainer.train()
        rollout = 2 * 4
        assert rows == {"teacher": 0 if alpha else rollout, "student": 3 * rollout}


class TestRefusals:
    def test_configuration_of_another_trainer_is_refused_by_its_type(self, tmp_path):
        args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(TypeError, match="args must be a MiniLLMConfig, got GRPOConfig"):
            MiniLLMTrainer(build_model("gpt2"), build_model("gpt2"), args=args, train_dataset=DATASET)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dataset": None}, "train_dataset is missing or empty"),
            ({"dataset": Dataset.from_dict({"prompt": []})}, "train_dataset is missing or empty"),
            ({"dataset": Dataset.from_dict({"text": ["a"]})}, r"no column 'prompt'; its columns are \['text'\]"),
            ({"eval_dataset": Dataset.from_dict({"text": ["a"]})}, "eval_dataset has no column 'prompt'"),
            ({"eval_dataset": {"a": DATASET, "b": DATASET.select([])}}, r"eval_dataset\['b'\] is empty"),
            ({"dataset": DATASET.select(range(3))}, "has 3 prompts, too few for one rollout"),
            ({"lm_coef": 0.5}, "lm_coef=0.5 has no effect without lm_dataset"),
            ({"lm_kd_ratio": 0.5}, "lm_kd_ratio=0.5 has no effect without lm_dataset"),
            ({"lm_dataset": DATASET.select([])}, "lm_dataset is empty"),
            ({"lm_dataset": Dataset.from_dict({"texts": ["a"]})}, r"lm_dataset has the columns \['texts'\]"),
            ({"beta": 0.1}, "beta=0.1 needs the initial student"),
            ({"rkl_advantage": False, "single_step_decomposition": False}, "leave nothing to train on"),
        ],
    )
    def test_bad_arguments_are_named(self, tmp_path, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"teacher_model_init_kwargs": {"attn_implementation": "flash_attention_2"}},
                "needs compute capability 8",
            ),
            (
                {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
                r"LLM.int8\(\) needs compute capability 7.5",
            ),
        ],
    )
    def test_what_the_card_cannot_run_is_refused_before_models_are_loaded(
        self, tmp_path, monkeypatch, options, message
    ):
        v100 = Machine((GPU("V100", (7, 0), 2**35),), 8, 2**36, "12.6", ("sm_70",), {"torch": "2.13.0"})
        monkeypatch.setattr(minillm_trl.training.checks, "probe", lambda: v100)
        config = make_config(tmp_path, **options)
        config.use_cpu = False
        with pytest.raises(ValueError, match=message):
            check_machine(config)

    def test_one_model_as_student_and_teacher_is_refused(self, tmp_path):
        model = build_model("gpt2")
        with pytest.raises(ValueError, match="are the same object"):
            make_trainer(tmp_path, student=model, teacher=model)

    def test_prompt_beyond_the_context_is_refused_with_its_length(self, tmp_path):
        trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": ["the river " * 100] * 8}))
        with pytest.raises(ValueError, match=r"exceed the models' context of 128.*'the river "):
            trainer.train()

    def test_different_tokenizers_are_refused_before_a_model_is_loaded(self, tmp_path, tokenizer):
        other = build_tokenizer(vocab_size=280)
        other.save_pretrained(
            tmp_path / "teacher"
        )  # a tokenizer without weights: loading the model would fail otherwise
        with pytest.raises(ValueError, match="different tokenizers"):
            MiniLLMTrainer(
                "no-such-student",
                str(tmp_path / "teacher"),
                args=make_config(tmp_path),
                train_dataset=DATASET,
                processing_class=tokenizer,
            )

    def test_unreproducible_head_is_refused(self, tmp_path):
        student = build_model("gpt2")
        student.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.raises(ValueError, match=r"LM head of the student .* is not reproduced"):
            make_trainer(tmp_path, student=student)

    @pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
    def test_virtual_tokens_are_refused(self, tmp_path, config: type[PromptLearningConfig]):
        with pytest.raises(ValueError, match=f"{config.__name__} is not supported"):
            make_trainer(tmp_path, peft_config=config(task_type="CAUSAL_LM", num_virtual_tokens=2))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"processing_class": ProcessorMixin()}, "Vision-language students are not supported"),
            ({"model": build_model("gpt2").half(), "precision": "fp16"}, r"trained weights in half precision \(tr"),
            ({"n_gpu": 2}, "One process sees 2 GPUs, .* CUDA_VISIBLE_DEVICES=0"),
            ({"use_reentrant": True, "num_processes": 2}, "use_reentrant=False in gradient_checkpointing_kwargs"),
            ({"is_fsdp_enabled": True, "fsdp_version": 1}, "Set fsdp_version: 2"),
            ({"is_fsdp_enabled": True, "cpu_ram_efficient_loading": True}, "Set it to false"),
            ({"is_fsdp_enabled": True, "use_vllm": True}, "FSDP with rollouts that TRL samples .* Use DDP"),
            ({"is_deepspeed_enabled": True, "teacher_shares_base": True}, "ZeRO-3 with teacher_shares_base=True"),
            ({"is_deepspeed_enabled": True, "model": lora_on_head()}, "ZeRO-3 with an adapter on the LM head"),
        ],
    )
    def test_student_that_cannot_be_trained_is_refused(self, tokenizer, changes: dict, message: str):
        def trainer(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            precision="no",
            num_processes=1,
            use_reentrant=False,
            n_gpu=0,
            **facts,
        ):
            state = SimpleNamespace(
                deepspeed_plugin=SimpleNamespace(zero_stage=3),
                fsdp_plugin=SimpleNamespace(
                    fsdp_version=fsdp_version, cpu_ram_efficient_loading=cpu_ram_efficient_loading
                ),
            )
            return SimpleNamespace(
                accelerator=SimpleNamespace(state=state, mixed_precision=precision, num_processes=num_processes),
                args=SimpleNamespace(
                    n_gpu=n_gpu,
                    gradient_checkpointing=True,
                    gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
                    teacher_shares_base=facts.pop("teacher_shares_base", False),
                    reshaping_fields=list,
                ),
                **{
                    "processing_class": tokenizer,
                    "model": build_model("gpt2"),
                    "aux_loss_enabled": False,
                    "beta": 0.0,
                    "use_vllm": False,
                    "is_fsdp_enabled": False,
                    "is_deepspeed_enabled": False,
                    **facts,
                },
            )

        check_model(trainer(), has_corpus=True)
        check_model(trainer(is_fsdp_enabled=True), has_corpus=True)
        check_model(trainer(is_deepspeed_enabled=True), has_corpus=True)
        with pytest.raises(ValueError, match=message):
            check_model(trainer(**changes), has_corpus=True)

    def test_mixture_of_experts_with_a_router_loss_is_refused_and_trains_without(self, tmp_path, tokenizer):
        def student(coefficient: float) -> MixtralForCausalLM:
            torch.manual_seed(0)
            config = MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=2,
                max_position_embeddings=128,
                router_aux_loss_coef=coefficient,
                eos_token_id=0,
                pad_token_id=1,
            )
            return MixtralForCausalLM(config)

        with pytest.raises(ValueError, match="Set output_router_logits or router_aux_loss_coef to 0"):
            make_trainer(tmp_path, student=student(0.01))
        trainer = make_trainer(tmp_path, student=student(0.0), max_steps=2)
        before = weights(trainer)
        trainer.train()
        assert not torch.equal(weights(trainer), before)


class TestStreams:
    """Prompts from an `IterableDataset`, as GRPO takes them."""

    @pytest.mark.parametrize("known_columns", [True, False])
    def test_unshuffled_stream_trains_like_the_dataset(self, tmp_path, known_columns: bool):
        stream = DATASET.to_iterable_dataset()
        if not known_columns:
            stream = IterableDataset.from_generator(lambda: iter(DATASET.to_list()))
            assert stream.column_names is None
        runs = [
            make_trainer(tmp_path / str(number), dataset=data, shuffle_dataset=False, num_generations=2)
            for number, data in enumerate((DATASET, stream))
        ]
        for run in runs:
            run.train()
        assert torch.equal(weights(runs[0]), weights(runs[1]))

    def test_stopped_run_resumes_at_its_place_in_a_shuffled_stream(self, tmp_path):
        options = {"dataset": DATASET.to_iterable_dataset(), "max_steps": 10, "num_iterations": 1}
        options |= {"save_strategy": "steps", "save_steps": 5}
        whole = make_trainer(tmp_path / "whole", **options)
        whole.train()  # 40 rows: the stream of 32 starts again
        resumed = make_trainer(tmp_path / "resumed", **options)
        resumed.train(tmp_path / "whole" / "checkpoint-5")
        assert torch.equal(weights(whole), weights(resumed))

    def test_what_is_no_stream_of_prompts_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="Set max_steps"):
            make_trainer(tmp_path, dataset=DATASET.to_iterable_dataset(), max_steps=-1)
        other = IterableDataset.from_generator(lambda: iter([{"question": "a"}]))
        with pytest.raises(UserError, match="no column 'prompt'; its columns are \\['question'\\]"):
            make_trainer(tmp_path, dataset=other)
        with pytest.raises(TypeError, match="must be a Dataset or IterableDataset, got list"):
            make_trainer(tmp_path, dataset=DATASET.to_list())
