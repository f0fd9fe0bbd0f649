"""Checks of the trainer: of arguments before it loads any weights, of models and rollouts before it uses them."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer, SFTTrainer

from ..config import MiniLLMConfig
from ..errors import UserError
from ..hardware.machine import probe, problems
from ..models.encoding import holds_conversations
from ..models.end_tokens import check_eos, find_end_tokens, read_generation_config
from ..models.init_kwargs import parsed_kwargs
from ..models.multimodal import refuse_multimodal
from ..models.pickled_weights import refuse_pickled_weights
from ..models.reference import check_adapters, check_reference
from ..models.teacher import check_same_tokenizer, tokenizer_source
from ..models.weight_formats import quantization_settings
from ..rollouts.cross_tokenizer import check_two_tokenizers
from ..teacher_server.remote_teacher import ServedTeacher
from .data_checks import check_columns, check_lm_dataset, check_train_dataset
from .teacher_choice import GivenTeachers, by_name, check_several_teachers, naming_teacher
from .trained_weights import check_trained_weights

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer

logger = logging.getLogger(__name__)


def check_arguments(
    model: str | PreTrainedModel,
    teacher_model: GivenTeachers,
    reward_funcs: Any,
    args: MiniLLMConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    processing_class: PreTrainedTokenizerBase | None,
    rollout_func: Callable | None,
    lm_dataset: Dataset | IterableDataset | None = None,
    has_environment: bool = False,
    peft_config: PeftConfig | None = None,
    tools: Sequence[Callable] | None = None,
) -> list[PreTrainedTokenizerBase]:
    """Check the arguments of [`MiniLLMTrainer`] against each other, and return the tokenizers of the teachers.

    Returns:
        `list[PreTrainedTokenizerBase]`: without teachers that were built in process or have no tokenizer.

    Raises:
        TypeError: if `args` is not a [`MiniLLMConfig`].
        ValueError: naming the argument, its value and the fix.
    """
    if not isinstance(args, MiniLLMConfig):
        raise TypeError(f"args must be a MiniLLMConfig, got {type(args).__name__}.")
    adapters = [peft_config] if peft_config is not None else list(getattr(model, "peft_config", {}).values())
    check_adapters(adapters, args.beta, args.teacher_shares_base)
    loads_reference = args.beta > 0 and not adapters  # an adapter's reference is the model without it
    if not args.allow_pickled_weights:
        _check_weight_files(model, teacher_model, reward_funcs, args, loads_reference)
    for name, teacher in by_name(teacher_model).items():
        with naming_teacher(name):
            if not isinstance(teacher, ServedTeacher):
                check_apart(model, teacher)
    if not (has_environment and train_dataset is None):  # an environment can provide the prompts
        check_train_dataset(train_dataset, args)
    for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
        if dataset is not None:
            check_columns(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")
    if isinstance(teacher_model, dict):
        check_several_teachers(list(teacher_model), args, train_dataset, eval_dataset, has_turns=bool(tools))
    if not (args.rkl_advantage or args.single_step_decomposition or reward_funcs or has_environment):
        raise UserError(
            "rkl_advantage=False, single_step_decomposition=False and no reward_funcs leave nothing to train on."
        )
    if rollout_func is not None and args.teacher_mixed_alpha > 0:
        logger.warning(
            f"rollout_func samples by itself, so teacher_mixed_alpha={args.teacher_mixed_alpha} is not used; the "
            "importance weights follow from the logprobs that it returns. Set teacher_mixed_alpha=0.0."
        )
    own_rollouts = {"rollout_func": rollout_func, "reward_funcs": reward_funcs}
    own_rollouts |= {"tools": tools, "an environment": has_environment}
    _check_own_rollouts(args, [name for name, given in own_rollouts.items() if given])
    check_lm_dataset(lm_dataset, args)
    if loads_reference and not isinstance(model, str) and not model.config._name_or_path:
        raise UserError(
            f"beta={args.beta} needs the initial student as reference, loaded from its folder, but this model was "
            "built in process. Save it and pass the folder, or set beta=0.0."
        )
    conversational = train_dataset is None or holds_conversations(train_dataset)
    found = []
    for name, teacher in by_name(teacher_model).items():
        with naming_teacher(name):
            found.append(_check_tokenizers(model, teacher, processing_class, conversational, args))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _check_weight_files(
    model: str | PreTrainedModel,
    teacher_model: GivenTeachers,
    reward_funcs: Any,
    args: MiniLLMConfig,
    loads_reference: bool,
) -> None:
    """Check that no model that will be loaded has pickled weights."""
    names = [model, *(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])]
    if loads_reference and not isinstance(model, str) and model.config._name_or_path:
        names.append(model.config._name_or_path)
    loaded: list[tuple[Any, Any]] = [(name, args.model_init_kwargs) for name in names]
    loaded += [(teacher, args.teacher_model_init_kwargs) for teacher in by_name(teacher_model).values()]
    for name, init_kwargs in loaded:
        if isinstance(name, str):
            refuse_pickled_weights(name, parsed_kwargs(init_kwargs))


def _check_own_rollouts(args: MiniLLMConfig, given: Sequence[str]) -> None:
    """Check that nothing that is given needs or makes other completions than the settings ask for."""
    for name in given:
        if args.cross_tokenizer and name != "reward_funcs":
            raise UserError(
                f"cross_tokenizer=True gives the teacher whole texts that the student wrote, which excludes {name}. "
                "Drop one of them."
            )
        for setting, is_set in (("lmbda", args.lmbda < 1.0), ("skd_top_k", args.skd_top_k is not None)):
            if is_set:
                value, off = getattr(args, setting), 1.0 if setting == "lmbda" else None
                raise UserError(f"{setting}={value} makes texts of its own, which excludes {name}. Set it to {off}.")
        if args.overlap_rollouts and name != "reward_funcs":
            raise UserError(
                f"overlap_rollouts=True samples from the copy of the student in a thread, which excludes {name}. Drop "
                "one of them."
            )
        if args.horizon_start is not None and name == "rollout_func":
            raise UserError(
                f"horizon_start={args.horizon_start} has no effect with rollout_func, which samples itself. Drop it."
            )
        if args.horizon_start is not None and name in ("tools", "an environment"):
            raise UserError(
                f"horizon_start={args.horizon_start} would limit each turn of a conversation with {name}, not the "
                "whole completion. Drop it, or lower max_completion_length."
            )


def check_apart(model: str | torch.nn.Module, teacher_model: str | torch.nn.Module) -> None:
    """Check that a teacher given as a module shares no module with the student, which training would change.

    Raises:
        ValueError: with the fix.
    """
    if isinstance(model, str) or isinstance(teacher_model, str):
        return
    if model is teacher_model:
        raise UserError("model and teacher_model are the same object; training would change the teacher.")
    own = {id(module) for module in model.modules()}
    if any(id(module) in own for module in teacher_model.modules()):
        raise UserError(
            f"teacher_model ({type(teacher_model).__name__}) shares modules with model ({type(model).__name__}). PEFT "
            "adds an adapter to its base model in place, which changes a teacher that is this base. Load the teacher "
            "separately. If the teacher is an adapter on the student's base, pass its folder and "
            "teacher_shares_base=True."
        )


def check_machine(args: MiniLLMConfig, quantization_config: Any = None) -> None:
    """Check that this machine can run the settings, before models are loaded.

    Raises:
        ValueError: with the setting, the card and a setting that works.
    """
    kwargs = [parsed_kwargs(given) or {} for given in (args.model_init_kwargs, args.teacher_model_init_kwargs)]
    settings = [quantization_settings(given) for given in ({"quantization_config": quantization_config}, *kwargs)]
    machine = probe()
    for attn_implementation in {given.get("attn_implementation") for given in kwargs}:
        for problem in problems(
            machine,
            bf16=bool(args.bf16),
            fp16=args.fp16,
            attn_implementation=attn_implementation,
            load_in_8bit=any(setting.get("load_in_8bit", False) for setting in settings),
            use_cpu=args.use_cpu,
            compile_rollouts=args.compile_rollouts,
        ):
            raise UserError(problem)


def check_student(trainer: GRPOTrainer | SFTTrainer) -> None:
    """Check a student that learns from a teacher's distributions, after TRL has loaded and placed it.

    Raises:
        ValueError: with the unsupported feature, and an alternative.
    """
    student: Any = trainer.model
    if isinstance(trainer.processing_class, ProcessorMixin):
        raise UserError("Vision-language students are not supported: the teacher is scored on text alone.")
    refuse_multimodal(student.config, f"model={student.config._name_or_path!r}")
    adapter = getattr(student, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise UserError(
            f"{type(adapter).__name__} is not supported: its virtual tokens precede the prompt, but student and "
            "teacher are scored on the same tokens. Use LoRA."
        )
    if trainer.aux_loss_enabled:
        raise UserError(
            "Mixture-of-experts students with a router loss are not supported. Set output_router_logits or "
            "router_aux_loss_coef to 0 in the model's config to train without it."
        )
    if trainer.args.n_gpu > 1:
        raise UserError(
            f"One process sees {trainer.args.n_gpu} GPUs, so transformers would use nn.DataParallel, which does not "
            "support scoring in the forward pass. Start a process for each GPU (--accelerate_config ddp_bf16 or "
            "v100_ddp_fp16), or make one GPU visible: CUDA_VISIBLE_DEVICES=0."
        )
    quantised = not all(parameter.is_floating_point() for parameter in student.parameters())
    wrapped = isinstance(student.get_output_embeddings(), (BaseTunerLayer, ModulesToSaveWrapper))
    _check_sharding(trainer, {"a quantised student": quantised, "an adapter on the LM head": wrapped})


def check_model(trainer: "TeacherMixedTrainer", has_corpus: bool = False) -> None:
    """Check the student of [`MiniLLMTrainer`] after GRPOTrainer has loaded and placed it.

    Raises:
        ValueError: with the unsupported feature, and an alternative.
    """
    args = trainer.args
    check_student(trainer)
    check_trained_weights(trainer)
    if trainer.beta > 0:
        check_reference(trainer.model, trainer.ref_model, trainer.accelerator)
    checkpointing = parsed_kwargs(args.gradient_checkpointing_kwargs) if args.gradient_checkpointing else None
    reentrant = checkpointing is not None and checkpointing.get("use_reentrant")
    if has_corpus and reentrant and trainer.accelerator.num_processes > 1:
        raise UserError(
            "lm_dataset with reentrant gradient checkpointing on several processes is not supported: both losses "
            "share a backward pass, in which gradients would be reduced twice. Set use_reentrant=False in "
            "gradient_checkpointing_kwargs. TRL sets it to True for adapters under ZeRO-3: use ZeRO-2 or FSDP there."
        )
    sampled_by_trl = trainer.use_vllm or bool(args.reshaping_fields())
    refused = {
        "teacher_shares_base=True": args.teacher_shares_base,
        "rollouts that TRL samples (vLLM, or a reshaped distribution)": sampled_by_trl,
    }
    _check_sharding(trainer, refused)


def _check_sharding(trainer: GRPOTrainer | SFTTrainer, refused: dict[str, bool]) -> None:
    """Check that the student can be sharded over processes as configured; `refused` names features that cannot."""
    state = trainer.accelerator.state
    is_zero3 = trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
    if trainer.is_fsdp_enabled:
        if state.fsdp_plugin.fsdp_version != 2:
            raise UserError("fsdp_version: 1 is not supported. Set fsdp_version: 2 in the accelerate configuration.")
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UserError(
                "fsdp_cpu_ram_efficient_loading: true keeps weights empty on all processes but the first until "
                "training starts, but student and teacher are checked before. Set it to false."
            )
    if not (is_zero3 or trainer.is_fsdp_enabled):
        return
    strategy = "ZeRO-3" if is_zero3 else "FSDP"
    for feature in (feature for feature, is_used in refused.items() if is_used):
        raise UserError(f"{strategy} with {feature} is not supported. Use DDP, or ZeRO stage 1 or 2.")


def check_prompt_ids(
    prompts: Sequence,
    prompt_ids: Sequence[Sequence[int]],
    max_completion_length: int,
    max_context: int | None,
    context_name: str = "context",
) -> None:
    """Check that every encoded prompt has a token, and that its completion fits into the context.

    Raises:
        ValueError: with the first prompt for which this is not so.
    """
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if len(ids) == 0:
            raise UserError(
                f"The prompt {prompt!r} has no tokens from which to predict the first token of its completion."
            )
        if max_context is not None and len(ids) + max_completion_length > max_context:
            raise UserError(
                f"A prompt of {len(ids)} tokens and max_completion_length={max_completion_length} exceed the models' "
                f"{context_name} of {max_context}. Shorten or drop the prompt that begins with {str(prompt)[:80]!r}, "
                "or lower max_completion_length."
            )


def check_groups(args: MiniLLMConfig, rows: int, processes: int) -> None:
    """Check that rows to score are whole groups of `num_generations`, if the baseline averages over groups.

    Raises:
        ValueError: with the number of rows.
    """
    group = args.num_generations
    assert group is not None  # set by GRPOConfig
    if args.advantage_baseline == "group" and rows * processes % group:
        raise UserError(
            f"advantage_baseline='group' is a mean over groups of num_generations={group} rows, got {rows} rows. "
            f"Score a multiple of {group} rows, the completions of a prompt next to each other."
        )


def check_completion_ids(completion_ids: torch.Tensor, mask: torch.Tensor, vocab_size: int) -> None:
    """Check that all trained tokens are in the shared vocabulary; other samplers may use a larger one.

    Raises:
        ValueError: with the token.
    """
    largest = completion_ids.masked_fill(~mask, 0).max().item() if mask.any() else 0
    if largest >= vocab_size:
        raise UserError(
            f"A completion has the token {largest}, but student and teacher share only tokens 0 to {vocab_size - 1}. "
            "Exclude it from sampling."
        )


def check_rollout_logps(logps: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Check the `logprobs` `(B, T)` of a rollout function on trained tokens. The importance weights depend on them.

    Raises:
        ValueError: if they cannot be log-probs of sampled tokens.
    """
    if logps is None or not mask.any():
        return
    given = logps[mask]
    if not given.isfinite().all() or given.max() > 1e-3 or (given == 0).all():
        raise UserError(
            f"rollout_func returned logprobs from {given.min().item()} to {given.max().item()}, which cannot be "
            "log-probs of sampled tokens. Return the log-probs under the policy that sampled the tokens, at the "
            "sampling temperature; or None if the current student sampled them."
        )


def _check_tokenizers(
    model: str | PreTrainedModel,
    teacher_model: str | PreTrainedModel | ServedTeacher,
    processing_class: PreTrainedTokenizerBase | None,
    conversational: bool,
    args: MiniLLMConfig,
) -> PreTrainedTokenizerBase | None:
    """Check the student's tokenizer, compare it with the teacher's, and return the teacher's."""
    student_name = _name_of(model)
    tokenizer = processing_class
    if tokenizer is None and student_name:
        tokenizer = AutoTokenizer.from_pretrained(student_name)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        ends = find_end_tokens(
            tokenizer,
            conversational=conversational,
            student=read_generation_config(model, trust_remote_code=args.trust_remote_code),
            eos_tokens=args.eos_tokens,
            chat_template_kwargs=parsed_kwargs(args.chat_template_kwargs),
        )
        check_eos(tokenizer, ends)
    no_tokenizer = "model was built in process, without a folder to load its tokenizer from. Pass processing_class."
    if isinstance(teacher_model, ServedTeacher):
        if tokenizer is None:
            raise UserError(no_tokenizer)
        teacher_model.check(tokenizer, conversational)
        return None
    teacher_name = _name_of(teacher_model)
    if not teacher_name and args.cross_tokenizer:
        raise UserError(
            "cross_tokenizer=True needs the teacher's tokenizer, but teacher_model was built in process, without a "
            "folder to load it from. Save both and pass the folder."
        )
    if not teacher_name:  # built in process: only its vocabulary size can be checked, later
        return None
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(teacher_name))
    except (OSError, ValueError) as error:
        if isinstance(teacher_model, str) or args.cross_tokenizer:
            raise UserError(f"teacher_model={teacher_name!r}: its tokenizer could not be loaded: {error}") from error
        logger.warning(
            f"The teacher's tokenizer could not be loaded from {teacher_name!r}, so it was not compared with the "
            "student's. Make sure that they are the same."
        )
        return None
    if tokenizer is None:
        raise UserError(no_tokenizer)
    if args.cross_tokenizer:
        check_two_tokenizers(tokenizer, teacher_tokenizer, conversational)
    else:
        check_same_tokenizer(tokenizer, teacher_tokenizer, conversational=conversational)
    return teacher_tokenizer


def _name_of(model: str | PreTrainedModel) -> str:
    """Return the name or folder of a model; empty if it was built in process."""
    return model if isinstance(model, str) else model.config._name_or_path
