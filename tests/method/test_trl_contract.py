"""What minillm_trl relies on in TRL beyond its public interface. These fail first when TRL moves."""

import ast
import inspect
import platform
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from conftest import build_model
from transformers.integrations import deepspeed
from trl import GRPOConfig, GRPOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import (
    FusedCausalLMOutput,
    RepeatSampler,
    add_fused_lm_head,
    create_model_from_path,
    split_tensor_dict,
)

import minillm_trl
from minillm_trl import MiniLLMTrainer
from minillm_trl.baselines import KDTrainer
from minillm_trl.config import _OneGeneration
from minillm_trl.training.trl_version import TESTED


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version_is_of_a_tested_line():
    assert version("trl").rsplit(".", 1)[0] in TESTED


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("_get_train_sampler", ["self", "dataset"]),
        ("_tokenize_prompts", ["self", "prompts"]),
        (
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (
            "_tool_call_loop",
            [
                *("self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images"),
                "multimodal_fields",
            ],
        ),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_overridden_methods_keep_their_signature(method: str, expected: list[str]):
    assert parameters(getattr(GRPOTrainer, method)) == expected


# Every private name of transformers and TRL that the trainers override (first), call, read or set
PRIVATE_IN_TRANSFORMERS = {
    *("_get_train_sampler", "_get_dataloader", "_prepare_inputs", "_run_epoch", "_get_grad_norm"),
    *("_get_output_dir", "_save_checkpoint", "_push_from_checkpoint", "_issue_warnings_after_load"),
    "_load_rng_state",
    *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"),
}
PRIVATE_IN_TRL = {
    *("_tokenize_prompts", "_generate_and_score_completions", "_generate_single_turn", "_tool_call_loop"),
    *("_get_per_token_logps_and_entropies", "_calculate_rewards", "_compute_loss", "_prepare_dataset"),
    *("_name", "_paper", "_tag_names"),
    *("_tokenizer", "_metrics", "_logs", "_total_train_tokens", "_last_loaded_step"),
}


def private_names(cls: type) -> set[str]:
    """The private names that a class defines, or that its methods use on `self`."""
    names = {*vars(cls), *re.findall(r"self\.(_\w+)", inspect.getsource(cls))}
    return {name for name in names if re.match("_[a-z]", name)}


def test_private_names_that_the_trainers_use_are_all_named_here():
    package = Path(minillm_trl.__file__).parent
    used = set()
    for path in (package / "trainer.py", *package.glob("training/*.py"), *package.glob("baselines/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {node.name} if isinstance(node, ast.FunctionDef) else set()
            used |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    of_transformers = private_names(transformers.Trainer)
    of_trl = set().union(*map(private_names, (GRPOTrainer, SFTTrainer, _BaseTrainer))) - of_transformers
    assert used & of_transformers == PRIVATE_IN_TRANSFORMERS
    assert used & of_trl == PRIVATE_IN_TRL


def overrides(trainer: type, base: type) -> dict[str, list[str]]:
    """The methods of TRL and transformers that a trainer overrides, with the classes that do."""
    own = trainer.__mro__[: trainer.__mro__.index(base)]
    names = {name for owner in own for name in vars(owner) if hasattr(base, name)}
    return {
        name: [owner.__name__ for owner in own if name in vars(owner)]
        for name in names
        if not name.startswith("__") and callable(getattr(base, name))
    }


def test_methods_of_grpo_are_overridden_in_one_class():
    of_grpo = {name for name in vars(GRPOTrainer) if not hasattr(transformers.Trainer, name)}
    found = {name: classes for name, classes in overrides(MiniLLMTrainer, GRPOTrainer).items() if name in of_grpo}
    assert len(found) >= 6
    assert set(map(tuple, found.values())) == {("MiniLLMTrainer",)}


@pytest.mark.parametrize(("trainer", "base"), [(MiniLLMTrainer, GRPOTrainer), (KDTrainer, SFTTrainer)])
def test_overrides_begin_with_what_they_replace(trainer: type, base: type):
    owners = {owner.__name__: owner for owner in trainer.__mro__}
    for name, classes in overrides(trainer, base).items():
        for owner in classes:
            body = inspect.getsource(vars(owners[owner])[name])
            assert re.search(r"\n +# (TRL|transformers): \w", body), f"{owner}.{name}"


def test_scoring_method_is_called_with_the_arguments_that_ours_takes():
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:6] == expected
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(" in source
    assert 'output["old_per_token_logps"] = old_per_token_logps' in source


def test_fused_head_keeps_the_method_that_it_replaces_under_the_name_that_ours_reads():
    model = build_model("gpt2", vocab_size=40)
    before = model.forward
    add_fused_lm_head(model)
    assert inspect.getclosurevars(model.forward.__func__).nonlocals["original_forward"] == before
    assert "if not fused_lm_head:" in inspect.getsource(add_fused_lm_head)


def test_compute_loss_goes_through_our_override():
    assert "return self._compute_loss(model, inputs)" in inspect.getsource(GRPOTrainer.compute_loss)


def test_loss_is_taken_as_scaled_for_gradient_accumulation():
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_constructor_takes_what_ours_passes_on():
    assert {
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "reward_processing_classes",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
        "rollout_func",
        "tools",
        "environment_factory",
    } <= set(parameters(GRPOTrainer.__init__))


def test_constructor_sets_what_ours_reads():
    source = inspect.getsource(GRPOTrainer.__init__)
    for line in (
        "self._tokenizer = processing_class",
        "self.eos_token_ids = eos_token_ids",
        "self.temperature = args.temperature",
        "self.max_completion_length = args.max_completion_length",
        "self.num_iterations = args.num_iterations",
        "self.aux_loss_enabled =",
        "self.num_generations_eval =",
        "self.num_generations = args.num_generations",
        "self.chat_template_kwargs = args.chat_template_kwargs or {}",
        "self.multi_objective_aggregation = args.multi_objective_aggregation",
        "self.scale_rewards = args.scale_rewards",
        "self.beta = args.beta",
        "self.ref_model = ",
        "self.rollout_func = rollout_func",
        "self.use_vllm = args.use_vllm",
        '"advantages": deque(maxlen=args.generation_batch_size)',
        'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}',
    ):
        assert line in source, line


def test_samplers_of_trl_read_what_ends_a_completion_when_they_sample():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "self.generation_config" in source
    assert "self.generation_kwargs = generation_kwargs" in inspect.getsource(GRPOTrainer.__init__)
    assert inspect.getsource(VLLMGeneration.generate).count("self.generation_kwargs") == 2  # server, colocated


def test_drafts_of_vllm_use_what_trl_keeps():
    constructor, sampling = (
        inspect.getsource(method) for method in (GRPOTrainer.__init__, GRPOTrainer._generate_single_turn)
    )
    assert "self.vllm_importance_sampling_correction = args.vllm_importance_sampling_correction" in constructor
    assert "if self.state.global_step != self._last_loaded_step:" in sampling
    assert "self.vllm_generation.sync_weights()" in sampling
    assert "self._last_loaded_step = self.state.global_step" in sampling
    assert "self.temperature = temperature" in inspect.getsource(VLLMGeneration.__init__)
    vllm = inspect.getsource(VLLMGeneration._init_vllm)
    assert "self.llm = LLM(" in vllm
    assert 'logprobs_mode="processed_logprobs"' in vllm  # the probabilities of drafts are at the sampling temperature
    # without the correction, GRPO does not ask for log-probs of the sampler
    scoring = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert scoring.count("self.use_vllm") == scoring.count(
        "self.use_vllm and self.vllm_importance_sampling_correction"
    )


def test_constructor_refuses_to_work_without_a_reward_source():
    # the reason for the placeholder; if this goes, the placeholder can go
    assert "No reward source provided" in inspect.getsource(GRPOTrainer.__init__)


def test_reward_sources_of_environments_come_behind_the_given_ones():
    # the placeholder is the first entry of each list and of the weights
    source = inspect.getsource(GRPOTrainer.__init__)
    assert "self.reward_funcs.append(get_reward)" in source
    assert "self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])" in source


def test_rollout_has_what_ours_takes_from_it():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for line in (
        'output["importance_sampling_ratio"] = vllm_importance_sampling_ratio',
        'output["sampling_per_token_logps"] = sampling_per_token_logps',
        'output["ref_per_token_logps"] = ref_per_token_logps',
        'output["tool_mask"] = tool_mask',
        'self._logs["advantages"].extend(all_process_advantages.tolist())',
        "rewards_per_func = self._calculate_rewards(",
    ):
        assert line in source, line


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("save_model", ["self", "output_dir", "_internal_call"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("create_scheduler", ["self", "num_training_steps", "optimizer"]),
        ("_issue_warnings_after_load", ["self", "load_result"]),
        ("_run_epoch", None),
    ],
)
def test_methods_of_transformers_trainer_that_resuming_overrides(method: str, expected: list[str] | None):
    if expected is not None:
        assert parameters(getattr(transformers.Trainer, method)) == expected
    for trainer in (GRPOTrainer, SFTTrainer):  # TRL leaves them alone, or passes on
        found = getattr(trainer, method)
        assert found is getattr(transformers.Trainer, method) or f"super().{method}" in inspect.getsource(found)


def test_hyperparameters_are_noted_between_the_new_schedule_and_the_checkpoint():
    source = inspect.getsource(transformers.Trainer._prepare_for_training)
    places = ["self.create_scheduler(", "deepspeed_load_checkpoint(", "self._load_optimizer_and_scheduler("]
    assert [source.index(each) for each in places] == sorted(source.index(each) for each in places)
    assert '("model", "optimizer", "lr_scheduler"):\n            setattr(self.callback_handler' in source
    loop = inspect.getsource(transformers.Trainer._inner_training_loop)  # they are set again when training begins
    assert loop.index("self._prepare_for_training(") < loop.index("self.callback_handler.on_train_begin(")


def test_run_that_was_told_to_stop_ends_when_its_checkpoint_is_written():
    source = inspect.getsource(transformers.Trainer._maybe_log_save_evaluate)
    assert source.index("self._save_checkpoint(") < source.index("self.callback_handler.on_save(")
    # an evaluation may withdraw a checkpoint, which the end of the epoch then writes
    assert source.index("self.control.should_save = is_new_best_metric") < source.index("if self.control.should_save:")
    epoch = inspect.getsource(transformers.Trainer._run_epoch)
    end = epoch.index("self.callback_handler.on_epoch_end(")
    assert epoch.rindex("self._maybe_log_save_evaluate(") > end > epoch.rindex("break")


def test_training_loop_has_what_resuming_takes_and_sets():
    loop = inspect.getsource(transformers.Trainer._inner_training_loop)
    for line in (
        "self._tr_loss = torch.tensor(0.0",
        "self._total_loss_scalar = 0.0",
        "self._globalstep_last_logged = self.state.global_step",
        "self._initial_global_step = self.state.global_step",
        "self.callback_handler.on_train_begin(",
        "epochs_trained=epochs_trained,",
        "steps_trained_in_current_epoch=steps_trained_in_current_epoch,",
        "train_dataloader=train_dataloader,",
    ):
        assert line in loop, line
    before_the_loop, rest = loop.split("self.callback_handler.on_train_begin(")
    assert before_the_loop.index("self._tr_loss =") > 0
    assert "if self.control.should_training_stop:\n                break" in rest
    epoch = inspect.getsource(transformers.Trainer._run_epoch)
    # the gradient's norm is known, and the step can be skipped, before the optimizer takes it
    assert epoch.index("grad_norm = self._get_grad_norm(") < epoch.index("self.optimizer.step()")
    assert epoch.index("self._load_rng_state(resume_from_checkpoint)") < epoch.index("iter(train_dataloader)")


def test_checkpoint_is_written_where_the_output_folder_is_said_to_be():
    source = inspect.getsource(transformers.Trainer._save_checkpoint)
    assert "run_dir = self._get_output_dir(trial=trial)" in source
    assert source.rindex("output_dir=run_dir") > source.index("self.state.save_to_json(")  # rotation, within it


def test_repeat_sampler_draws_the_order_from_its_own_generator():
    source = inspect.getsource(RepeatSampler)
    assert "self.generator.manual_seed(seed)" in source
    assert "torch.randperm(self.num_samples, generator=self.generator)" in source
    assert parameters(RepeatSampler.__init__) == [
        *("self", "data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
    ]
    assert "_total_train_tokens = 0" in inspect.getsource(GRPOTrainer.__init__)


def test_every_turn_of_a_tool_loop_goes_through_our_sampler():
    assert "self._generate_single_turn(" in inspect.getsource(GRPOTrainer._tool_call_loop)
    assert "self._generate_single_turn(" in inspect.getsource(GRPOTrainer._generate)


def test_metrics_of_rollouts_that_ours_replace_are_those_that_grpo_logs():
    source = inspect.getsource(GRPOTrainer._generate)
    lengths = [f"{which}_{name}" for name in ("length", "terminated_length") for which in ("mean", "min", "max")]
    for name in (*lengths, "clipped_ratio"):
        assert f'self._metrics[mode]["completions/{name}"].append(' in source
    assert "ids[-1] not in eos_and_pad for ids in completion_ids" in source
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for name in ("rewards/{reward_func_name}/mean", "rewards/{reward_func_name}/std"):
        assert f'self._metrics[mode][f"{name}"].append(' in source
    for name in ("reward", "reward_std", "frac_reward_zero_std"):
        assert f'self._metrics[mode]["{name}"].append(' in source
    assert "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)" in source
    for line in (
        'self._logs["prompt"].extend(gather_object(prompts))',
        'self._logs["completion"].extend(gather_object(completions))',
        'self._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())',
        'self._logs["extra"][column].extend(gather_object(values))',
    ):
        assert line in source


def test_rows_of_an_evaluation_pass_the_method_that_ours_fills_up():
    expected = ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"]
    assert parameters(transformers.Trainer._get_dataloader) == expected
    for trainer in (GRPOTrainer, SFTTrainer):
        source = inspect.getsource(trainer.get_eval_dataloader)
        assert "self._get_dataloader(" in source
        assert "is_training" not in source
        assert "is_training=True" in inspect.getsource(trainer.get_train_dataloader)
    assert "mini_repeat_count=self.num_generations_eval" in inspect.getsource(GRPOTrainer._get_eval_sampler)


def test_evaluation_metrics_are_prefixed_once():
    assert 'f"eval_{key}": val for key, val in metrics.items()' in inspect.getsource(GRPOTrainer.log)


def test_training_step_asks_for_one_micro_batch():
    assert inspect.getsource(transformers.Trainer.training_step).count("self._prepare_inputs(") == 1
    assert "output = super().training_step(model, inputs, num_items_in_batch)" in inspect.getsource(
        GRPOTrainer.training_step
    )


def test_config_compares_num_generations_in_the_ways_that_our_one_answers():
    source = inspect.getsource(GRPOConfig.__post_init__)
    assert "if self.num_generations < 2:" in source
    assert not _OneGeneration(1) < 2
    assert _OneGeneration(1) < 3
    assert 8 % _OneGeneration(1) == 0


def test_helpers_keep_their_signature():
    assert parameters(disable_gradient_checkpointing) == ["model", "gradient_checkpointing_kwargs"]
    assert {"model", "accelerator", "gradient_checkpointing_kwargs"} <= set(parameters(unwrap_model_for_generation))
    assert parameters(split_tensor_dict) == ["tensor_dict", "num_chunks"]


def test_split_keeps_rows_together_and_in_order():
    parts = split_tensor_dict({"a": torch.arange(6), "b": torch.arange(12).view(6, 2)}, 3)
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[1]["b"].tolist() == [[4, 5], [6, 7]]


def test_sft_trainer_takes_what_the_command_line_passes():
    assert {"model", "args", "train_dataset", "eval_dataset", "processing_class", "peft_config"} <= set(
        parameters(SFTTrainer.__init__)
    )


class TestWhatFineTuningReliesOn:
    def test_overridden_methods_keep_their_signature(self):
        arguments = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
        assert parameters(SFTTrainer.compute_loss) == arguments
        assert parameters(SFTTrainer.evaluate) == ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]

    def test_data_is_encoded_once_tokenizer_and_template_are_what_they_will_be(self):
        arguments = ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
        assert parameters(SFTTrainer._prepare_dataset) == ["self", *arguments]
        source = inspect.getsource(SFTTrainer.__init__)
        encoded = source.index("train_dataset = self._prepare_dataset(")
        for before in (
            "self._tokenizer = processing_class",
            "self._tokenizer.eos_token = args.eos_token",
            "processing_class.chat_template = chat_template_file.read()",
        ):
            assert source.index(before) < encoded
        source = inspect.getsource(SFTTrainer._prepare_dataset)
        assert '**example.get("chat_template_kwargs", {})' in source
        assert '"eos_token": self._tokenizer.eos_token' in source

    def test_metrics_of_an_evaluation_reach_its_result(self):
        log = inspect.getsource(SFTTrainer.log)
        assert 'metrics = {f"eval_{key}": val for key, val in metrics.items()}' in log
        assert "logs.update(metrics)" in log  # the dict that `evaluate` returns
        evaluate = inspect.getsource(transformers.Trainer.evaluate)
        assert "self.log(output.metrics)" in evaluate
        assert evaluate.index("self.log(output.metrics)") < evaluate.index("return output.metrics")

    def test_losses_are_taken_as_divided_by_the_tokens_of_the_step(self):
        source = inspect.getsource(SFTTrainer.compute_loss)
        assert "per_token_loss.sum() / torch.as_tensor(num_tokens)" in source
        assert "loss = loss * (self.accelerator.num_processes // self.get_tp_size())" in source

    def test_metrics_that_ours_replace_come_from_what_the_fused_head_returns(self):
        source = inspect.getsource(SFTTrainer.compute_loss)
        assert "outputs = model(**inputs, fused_lm_head=True)" in source
        for name in ("entropy", "mean_token_accuracy"):
            assert f'self._metrics[mode]["{name}"].append(' in source
        assert {"label_mask", "entropy", "is_top1"} <= {each.name for each in fields(FusedCausalLMOutput)}

    def test_evaluation_asks_for_the_loss_alone(self):
        assert "self.compute_loss(model, inputs, return_outputs=False)" in inspect.getsource(
            SFTTrainer.prediction_step
        )

    def test_labels_of_prompts_are_masked_by_the_collators_default(self):
        collator = DataCollatorForLanguageModeling(pad_token_id=1)
        batch = collator([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8]}])
        assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


class TestWhatShardingReliesOn:
    """In transformers and accelerate; tests/training/test_distributed.py runs it."""

    def test_generation_leaves_sharded_weights_alone_when_told_so(self):
        assert "gather_deepspeed3_params" in parameters(unwrap_model_for_generation)

    def test_students_of_fsdp_and_zero_are_told_by_the_trainer(self):
        source = inspect.getsource(transformers.Trainer)
        assert "self.is_fsdp_enabled =" in source
        assert "self.is_deepspeed_enabled =" in source

    def test_transformers_spreads_what_it_loads_by_a_configuration_that_can_be_put_aside(self):
        assert not deepspeed.is_deepspeed_zero3_enabled()
        plugin = DeepSpeedPluginStandIn()
        deepspeed.set_hf_deepspeed_config(plugin)
        assert deepspeed.is_deepspeed_zero3_enabled()
        deepspeed.unset_hf_deepspeed_config()
        assert not deepspeed.is_deepspeed_zero3_enabled()
        assert "self.dschf = HfDeepSpeedConfig(" in inspect.getsource(DeepSpeedPlugin.set_deepspeed_weakref)

    def test_accelerate_has_a_policy_for_fsdp_of_its_own_which_ours_replaces(self):
        source = inspect.getsource(FullyShardedDataParallelPlugin.set_mixed_precision)
        assert 'dtype_args["output_dtype"] = dtype' in source
        assert "fsdp2_plugin.mixed_precision_policy or MixedPrecisionPolicy()" in inspect.getsource(
            fsdp2_prepare_model
        )

    def test_names_lose_what_activation_checkpointing_adds(self):
        names = fsdp2_canonicalize_names({"model.layers.0._checkpoint_wrapped_module.weight": 0})
        assert list(names) == ["model.layers.0.weight"]

    def test_adapters_of_quantised_students_are_cast_by_grpo(self):
        source = inspect.getsource(GRPOTrainer.__init__)
        assert "param.data = param.data.to(torch.bfloat16)" in source


class TestWhatSkippedStepsRelyOn:
    """In transformers, accelerate and torch; tests/training/test_reliable_runs.py runs it."""

    def test_gradients_are_checked_between_clipping_and_the_step(self):
        source = inspect.getsource(transformers.Trainer._run_epoch)
        places = ["self._clip_grad_norm(model)", "self._get_grad_norm(model", "self.optimizer.step()"]
        assert [source.index(each) for each in places] == sorted(source.index(each) for each in places)
        assert (
            "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)" in source
        )  # anew in each micro-batch

    def test_optimizer_and_schedule_do_nothing_in_steps_that_are_not_synchronised(self):
        assert "if self.gradient_state.sync_gradients:" in inspect.getsource(AcceleratedOptimizer.step)
        assert "if not self.gradient_state.sync_gradients:" in inspect.getsource(AcceleratedScheduler.step)

    def test_scaler_forgets_a_step_when_it_is_told_its_scale(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler.scale(weight.sum() * torch.nan).backward()
        scaler.unscale_(optimizer)
        scaler.update(scaler.get_scale())
        assert scaler.get_scale() == 8.0
        weight.grad = None
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)  # would raise if the scaler still had the step before
        assert weight.item() == 0.0

    def test_scalers_of_zero_keep_their_state_in_plain_attributes(self):
        loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
        scaler = loss_scaler.DynamicLossScaler(8.0, 100, 1.0, 1, False)
        assert {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} <= vars(scaler).keys()


class DeepSpeedPluginStandIn:
    def is_zero3(self) -> bool:
        return True


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="products with oneDNN's operators run on x86 CPUs only",
)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "_linear_pointwise",
            "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
        ),
        ("_reorder_linear_weight", "(Tensor self, int? batch_size=None) -> Tensor Y"),
    ],
)
def test_operators_of_onednn_take_the_arguments_that_packed_weights_give(name: str, expected: str):
    """minillm_trl/models/packed_weights.py calls these private operators of torch."""
    schema = str(getattr(torch.ops.mkldnn, name).default._schema)
    assert schema.replace(f"mkldnn::{name}", "", 1) == expected


def test_number_of_gpus_and_device_map_of_a_process_can_be_set(tmp_path):
    """minillm_trl/training/rollout_device.py sets both, so that a second GPU is free for rollouts."""
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    args._n_gpu = 3
    assert args.n_gpu == 3  # as Trainer asks before it wraps the model
    assert args.device.type == "cpu"
    assert args.n_gpu == 3
    assert 'if "device_map" not in kwargs' in inspect.getsource(create_model_from_path)
    assert "dict(args.model_init_kwargs or {})" in inspect.getsource(GRPOTrainer.__init__)
