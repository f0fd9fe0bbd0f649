"""What the trainer refuses: arguments before any weight is loaded, models and rollouts before they are used."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

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
from ..models.multimodal import refuse_multimodal
from ..models.pickled_weights import refuse_pickled_weights
from ..models.reference import check_adapters, check_reference
from ..models.teacher import check_same_tokenizer, tokenizer_source
from ..models.weight_formats import quantization_settings
from .trained_weights import check_trained_weights

logger = logging.getLogger(__name__)


def check_arguments(
    model: str | PreTrainedModel,
    teacher_model: str | PreTrainedModel,
    reward_funcs: Any,
    args: MiniLLMConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    processing_class: PreTrainedTokenizerBase | None,
    rollout_func: Callable | None,
    lm_dataset: Dataset | IterableDataset | None = None,
    has_environment: bool = False,
    peft_config: PeftConfig | None = None,
) -> PreTrainedTokenizerBase | None:
    """Check the arguments of [`MiniLLMTrainer`] against each other, and return the teacher's tokenizer.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`], None for a teacher that was built in process or came without one.

    Raises:
        TypeError: if `args` is no [`MiniLLMConfig`].
        ValueError: naming the argument, its value and the fix.
    """
    if not isinstance(args, MiniLLMConfig):
        raise TypeError(f"args must be a MiniLLMConfig, got {type(args).__name__}.")
    adapters = [peft_config] if peft_config is not None else list(getattr(model, "peft_config", {}).values())
    check_adapters(adapters, args.beta, args.teacher_shares_base)
    loads_reference = args.beta > 0 and not adapters  # with an adapter, the model without it is what it was
    if not args.allow_pickled_weights:
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        names = [model, *rewards]
        if loads_reference and not isinstance(model, str) and model.config._name_or_path:
            names.append(model.config._name_or_path)
        loaded = [(name, args.model_init_kwargs) for name in names]
        for name, init_kwargs in (*loaded, (teacher_model, args.teacher_model_init_kwargs)):
            if isinstance(name, str):
                refuse_pickled_weights(name, init_kwargs)
    check_apart(model, teacher_model)
    if not (has_environment and train_dataset is None):  # an environment may bring its own prompts
        _check_train_dataset(train_dataset, args)
    for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
        if dataset is not None:
            _check_columns(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")
    if not (args.rkl_advantage or args.single_step_decomposition or reward_funcs or has_environment):
        raise UserError(
            "rkl_advantage=False, single_step_decomposition=False and no reward_funcs leave nothing to train on."
        )
    if rollout_func is not None and args.teacher_mixed_alpha > 0:
        logger.warning(
            f"rollout_func samples by itself, so teacher_mixed_alpha={args.teacher_mixed_alpha} is not used; the "
            "importance weights are those of the logprobs that it returns. Set teacher_mixed_alpha=0.0."
        )
    if lm_dataset is None:
        for name, default in (("lm_coef", 1.0), ("lm_kd_ratio", 0.0)):
            if getattr(args, name) != default:
                raise UserError(
                    f"{name}={getattr(args, name)} has no effect without lm_dataset. Pass one, or drop {name}."
                )
    elif isinstance(lm_dataset, Dataset) and len(lm_dataset) == 0:
        raise UserError("lm_dataset is empty.")
    if loads_reference and not isinstance(model, str) and not model.config._name_or_path:
        raise UserError(
            f"beta={args.beta} needs the student as it was, which is loaded from where the student came from; this "
            "model was built in process. Save it and pass the folder, or set beta=0.0."
        )
    conversational = train_dataset is None or holds_conversations(train_dataset)
    return _check_tokenizers(model, teacher_model, processing_class, conversational, args)


def check_apart(model: str | torch.nn.Module, teacher_model: str | torch.nn.Module) -> None:
    """Check that no module of a teacher that is loaded already is one of the student's, which training would move.

    Raises:
        ValueError: with the fix.
    """
    if isinstance(model, str) or isinstance(teacher_model, str):
        return
    if model is teacher_model:
        raise UserError("model and teacher_model are the same object; training it would move the teacher.")
    own = {id(module) for module in model.modules()}
    if any(id(module) in own for module in teacher_model.modules()):
        raise UserError(
            f"teacher_model ({type(teacher_model).__name__}) shares modules with model ({type(model).__name__}): an "
            "adapter is put into its base, which then is no teacher of its own. Load the teacher once more; or, for a "
            "teacher that is an adapter on the student's base, pass its folder and teacher_shares_base=True."
        )


def check_machine(args: MiniLLMConfig, quantization_config: Any = None) -> None:
    """Check that this machine can run the settings, before hours are spent on loading models.

    Raises:
        ValueError: naming the setting, the card and what to set instead.
    """
    kwargs = [args.model_init_kwargs or {}, args.teacher_model_init_kwargs or {}]
    settings = [quantization_settings(given) for given in ({"quantization_config": quantization_config}, *kwargs)]
    machine = probe()
    for attn_implementation in {given.get("attn_implementation") for given in kwargs}:
        for problem in problems(
            machine,
            bf16=args.bf16,
            fp16=args.fp16,
            attn_implementation=attn_implementation,
            load_in_8bit=any(setting.get("load_in_8bit", False) for setting in settings),
            use_cpu=args.use_cpu,
            compile_rollouts=args.compile_rollouts,
        ):
            raise UserError(problem)


def check_student(trainer: GRPOTrainer | SFTTrainer) -> None:
    """Check what is known of a student that learns from a teacher's distributions, once TRL has loaded and placed it.

    Raises:
        ValueError: naming what is not supported, and what to do instead.
    """
    if isinstance(trainer.processing_class, ProcessorMixin):
        raise UserError("Vision-language students are not supported: the teacher is scored on text alone.")
    refuse_multimodal(trainer.model.config, f"model={trainer.model.config._name_or_path!r}")
    adapter = getattr(trainer.model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise UserError(
            f"{type(adapter).__name__} is not supported: student and teacher are scored on the same tokens, without "
            "virtual ones before them. Use LoRA."
        )
    if trainer.aux_loss_enabled:
        raise UserError(
            "Mixture-of-experts students with a router loss are not supported. Set output_router_logits or "
            "router_aux_loss_coef to 0 in the model's config to train without it."
        )
    if trainer.args.n_gpu > 1:
        raise UserError(
            f"One process sees {trainer.args.n_gpu} GPUs, over which transformers would spread each batch with "
            "nn.DataParallel; scores are not computed in its copies. Start a process for each GPU "
            "(--accelerate_config ddp_bf16 or v100_ddp_fp16), or let it see one: CUDA_VISIBLE_DEVICES=0."
        )
    quantised = not all(parameter.is_floating_point() for parameter in trainer.model.parameters())
    wrapped = isinstance(trainer.model.get_output_embeddings(), (BaseTunerLayer, ModulesToSaveWrapper))
    _check_sharding(trainer, {"a quantised student": quantised, "an adapter on the LM head": wrapped})


def check_model(trainer: GRPOTrainer, has_corpus: bool = False) -> None:
    """Check what is known of the student of [`MiniLLMTrainer`] once GRPOTrainer has loaded and placed it.

    Raises:
        ValueError: naming what is not supported, and what to do instead.
    """
    check_student(trainer)
    check_trained_weights(trainer)
    if trainer.beta > 0:
        check_reference(trainer.model, trainer.ref_model, trainer.accelerator)
    checkpointing = trainer.args.gradient_checkpointing and (trainer.args.gradient_checkpointing_kwargs or {})
    if has_corpus and checkpointing and checkpointing.get("use_reentrant") and trainer.accelerator.num_processes > 1:
        raise UserError(
            "lm_dataset with reentrant gradient checkpointing on several processes is not supported: the two losses "
            "share one backward pass, in which it would reduce each gradient twice. Set use_reentrant=False in "
            "gradient_checkpointing_kwargs. TRL sets it to True for adapters under ZeRO-3: use ZeRO-2 or FSDP there."
        )
    sampled_by_trl = trainer.use_vllm or bool(trainer.args.reshaping_fields())
    refused = {
        "teacher_shares_base=True": trainer.args.teacher_shares_base,
        "rollouts that TRL samples (vLLM, or a reshaped distribution)": sampled_by_trl,
    }
    _check_sharding(trainer, refused)


def _check_sharding(trainer: GRPOTrainer | SFTTrainer, refused: dict[str, bool]) -> None:
    """Check the student against the way in which it is to be sharded over processes, if it is."""
    state = trainer.accelerator.state
    is_zero3 = trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
    if trainer.is_fsdp_enabled:
        if state.fsdp_plugin.fsdp_version != 2:
            raise UserError("fsdp_version: 1 is not supported. Set fsdp_version: 2 in the accelerate configuration.")
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UserError(
                "fsdp_cpu_ram_efficient_loading: true leaves the weights of all processes but the first empty until "
                "training starts, before which student and teacher are checked. Set it to false."
            )
    if not (is_zero3 or trainer.is_fsdp_enabled):
        return
    strategy = "ZeRO-3" if is_zero3 else "FSDP"
    for what in (what for what, is_so in refused.items() if is_so):
        raise UserError(f"{strategy} with {what} is not supported. Use DDP, or ZeRO stage 1 or 2.")


def check_prompt_ids(
    prompts: Sequence,
    prompt_ids: Sequence[Sequence[int]],
    max_completion_length: int,
    max_context: int | None,
    context_name: str = "context",
) -> None:
    """Check that every encoded prompt has a token, and room for its completion.

    Raises:
        ValueError: naming the first prompt that does not.
    """
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if len(ids) == 0:
            raise UserError(f"The prompt {prompt!r} has no tokens, so nothing predicts its completion's first token.")
        if max_context is not None and len(ids) + max_completion_length > max_context:
            raise UserError(
                f"A prompt of {len(ids)} tokens and max_completion_length={max_completion_length} exceed the models' "
                f"{context_name} of {max_context}. Shorten or drop the prompt that begins with {str(prompt)[:80]!r}, "
                "or lower max_completion_length."
            )


def check_completion_ids(completion_ids: torch.Tensor, mask: torch.Tensor, vocab_size: int) -> None:
    """Check that every trained token lies in the shared vocabulary, which samplers other than ours may leave.

    Raises:
        ValueError: naming the token.
    """
    largest = completion_ids.masked_fill(~mask, 0).max().item() if mask.any() else 0
    if largest >= vocab_size:
        raise UserError(
            f"A completion has the token {largest}, but student and teacher share the rows 0 to {vocab_size - 1} of "
            "their vocabularies. Exclude it where the completions are sampled."
        )


def check_rollout_logps(logps: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Check the `logprobs` of a rollout function, `(B, T)`, where tokens are trained.

    Raises:
        ValueError: if they cannot be log-probs of sampled tokens, on which the importance weights rest.
    """
    if logps is None or not mask.any():
        return
    given = logps[mask]
    if not given.isfinite().all() or given.max() > 1e-3 or (given == 0).all():
        raise UserError(
            f"rollout_func returned logprobs that are none: their range is {given.min().item()} to "
            f"{given.max().item()}. Return the log-probs of the sampled tokens under the policy that sampled them, at "
            "the sampling temperature; or None if the student sampled as it is."
        )


def _check_tokenizers(
    model: str | PreTrainedModel,
    teacher_model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None,
    conversational: bool,
    args: MiniLLMConfig,
) -> PreTrainedTokenizerBase | None:
    """Check the student's tokenizer, and compare it with the teacher's, which is returned."""
    student_name, teacher_name = (
        named if isinstance(named, str) else named.config._name_or_path for named in (model, teacher_model)
    )
    tokenizer = processing_class
    if tokenizer is None and student_name:
        tokenizer = AutoTokenizer.from_pretrained(student_name)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        options = {"conversational": conversational, "chat_template_kwargs": args.chat_template_kwargs}
        generation_config = read_generation_config(model, trust_remote_code=args.trust_remote_code)
        ends = find_end_tokens(tokenizer, student=generation_config, eos_tokens=args.eos_tokens, **options)
        check_eos(tokenizer, ends)
    if not teacher_name:  # built in process: its vocabulary's size is all that can be checked, once it is placed
        return None
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(teacher_name))
    except (OSError, ValueError) as error:
        if isinstance(teacher_model, str):
            raise UserError(
                f"teacher_model={teacher_name!r}: no tokenizer could be loaded from there: {error}"
            ) from error
        logger.warning(
            f"The teacher's tokenizer could not be loaded from {teacher_name!r}, so it was not compared. "
            "Make sure that it is the student's."
        )
        return None
    check_same_tokenizer(tokenizer, teacher_tokenizer, conversational=conversational)
    return teacher_tokenizer


def _check_train_dataset(dataset: Dataset | IterableDataset | None, args: MiniLLMConfig) -> None:
    if dataset is None or next(iter(dataset), None) is None:
        raise UserError("train_dataset is missing or empty: MiniLLM needs prompts to sample completions for.")
    _check_columns(dataset, "train_dataset")
    if isinstance(dataset, Dataset):
        check_fills_rollout(dataset, args, "train_dataset")


def check_fills_rollout(prompts: Dataset, args: MiniLLMConfig, source: str, repeats: str = "") -> None:
    """Check that there are prompts enough for one rollout.

    Args:
        prompts ([`~datasets.Dataset`]): each prompt in a row.
        args ([`MiniLLMConfig`]): configuration.
        source (`str`): what the user calls them; the message begins with it.
        repeats (`str`, *optional*): from how many rows they came, if some had the same prompt.

    Raises:
        UserError: with the number of prompts.
    """
    if len(prompts) * args.num_generations < args.generation_batch_size:
        remark = f" ({repeats})" if repeats else ""
        raise UserError(
            f"{source} has {len(prompts)} prompts{remark}, too few for one rollout of generation_batch_size="
            f"{args.generation_batch_size} completions with num_generations={args.num_generations}. Lower "
            "steps_per_generation or per_device_train_batch_size, or raise num_generations."
        )


def _check_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise UserError(f"{name} is empty.")
    columns = dataset.column_names  # None for a stream of unknown features
    if columns is not None and "prompt" not in columns:
        raise UserError(f"{name} has no column 'prompt'; its columns are {columns}. Rename the right one.")
