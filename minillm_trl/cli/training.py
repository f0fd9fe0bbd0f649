"""Shared steps of the training subcommands: checks before models are loaded, training, saving, resuming."""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from ..errors import UserError
from ..files.json_files import read_json
from ..models.adapters import is_adapter, refuse_adapter
from ..models.encoding import holds_conversations
from ..models.files import check_weights
from ..models.init_kwargs import parsed_kwargs
from ..models.loading import load_config, load_tokenizer
from ..models.multimodal import refuse_multimodal
from ..models.pickled_weights import refuse_pickled_weights
from ..models.teacher import check_same_tokenizer
from ..monitoring.degeneration_watch import DegenerationWatch
from ..rollouts.cross_tokenizer import check_two_tokenizers
from ..training.checkpoints import finish_replacements, newest_whole_checkpoint
from ..training.reliable_trainer import ReliableTrainer
from ..training.run_record import RunRecord

if TYPE_CHECKING:
    from ..baselines import FineTuningConfig, KDConfig
    from ..config import MiniLLMConfig

    TrainerConfig = MiniLLMConfig | FineTuningConfig

DEGENERATED = 3  # exit status


def check_teacher_tokenizer(
    teacher: str, args: "MiniLLMConfig | KDConfig", tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    """Check that the teacher has the student's tokenizer, before either model is loaded; see [`check_same_tokenizer`].

    With `cross_tokenizer`, check that the teacher can read the student's texts.

    Args:
        teacher (`str`): name or folder of the teacher.
        args ([`MiniLLMConfig`] or [`KDConfig`]): with `teacher_model_init_kwargs` and `trust_remote_code`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        train ([`~datasets.Dataset`]): with a column `prompt`; for conversations the chat templates must agree too.
    """
    revision = (parsed_kwargs(args.teacher_model_init_kwargs) or {}).get("revision")
    teacher_tokenizer = load_tokenizer(teacher, revision, args.trust_remote_code)
    if getattr(args, "cross_tokenizer", False):  # KD has no such field
        check_two_tokenizers(tokenizer, teacher_tokenizer, holds_conversations(train))
    else:
        check_same_tokenizer(tokenizer, teacher_tokenizer, conversational=holds_conversations(train))


def check_models(names: Sequence[str], args: "TrainerConfig") -> None:
    """Check the local files of the student and, if any, of the teachers before a trainer loads them.

    Raises:
        ValueError: names the file that is damaged or may not be loaded, or the model that is not a text model.
    """
    student = names[0]
    refuse_adapter("--model_name_or_path", student)
    teacher_kwargs = parsed_kwargs(getattr(args, "teacher_model_init_kwargs", None))
    for number, name in enumerate(names):
        init_kwargs = teacher_kwargs if number else parsed_kwargs(args.model_init_kwargs)
        if not Path(name).is_dir():
            continue
        if not args.allow_pickled_weights:
            refuse_pickled_weights(name, init_kwargs)
        check_weights(name)
        if not is_adapter(name):
            config = load_config(name, args.trust_remote_code)
            if name == student:
                refuse_multimodal(config, f"--model_name_or_path {student}")


def set_model_init_kwargs(args: "TrainerConfig", model: ModelConfig) -> None:
    """Set how the trainer loads the student: by `args.model_init_kwargs`, then by the options in `model`."""
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "use_safetensors": None if args.allow_pickled_weights else True,
        **(parsed_kwargs(args.model_init_kwargs) or {}),
    }


def quantization_config(model: ModelConfig, args: "TrainerConfig") -> BitsAndBytesConfig | None:
    """Return the configuration for `load_in_4bit` or `load_in_8bit`, if set.

    4-bit layers compute in the run's precision unless `dtype` is set.
    """
    config = get_quantization_config(model)
    if config is not None and config.load_in_4bit and model.dtype in (None, "auto"):  # bitsandbytes would take float32
        config.bnb_4bit_compute_dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    return config


def train_and_save(trainer: ReliableTrainer, checkpoint: str | bool | None, record: RunRecord) -> int:
    """Train, resuming from `checkpoint` if given, and save the model to `output_dir`.

    Returns:
        `int`: exit status: 0, or 3 if training stopped because the student degenerated. In that case only the model of
        the best checkpoint is saved, if there is one.

    Raises:
        ValueError: if the checkpoint has pickles with more than tensors and numbers.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as stop:
        stop.add_note(how_to_continue(str(trainer.args.output_dir)))
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: a file in it (.pt, .pth, .bin) contains objects that no trainer "
            "saves. It was not unpickled, since that can run any code. Resume from a checkpoint that your run wrote."
        ) from error
    watches = (watch for watch in trainer.callback_handler.callbacks if isinstance(watch, DegenerationWatch))
    kinds = {found.kind for watch in watches for found in watch.stopped_for}
    folder = trainer.args.output_dir
    if kinds:
        record.stop(f"degeneration: {', '.join(sorted(kinds))}")
    if kinds and not (trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint):
        trainer.accelerator.print(f"Stopped; the degenerate model was not saved to {folder}")
        return DEGENERATED
    trainer.save_whole_model()
    trainer.accelerator.print(f"Saved to {folder}")
    return DEGENERATED if kinds else 0


def how_to_continue(output_dir: str) -> str:
    """Return how to continue after training was stopped: resume from the newest checkpoint, or start again."""
    newest = newest_whole_checkpoint(Path(output_dir))
    if newest is None:
        return "It has saved no checkpoint yet (save_strategy, save_steps); the same command starts over."
    return f"Add --resume_from_checkpoint true to continue from {newest}."


def checkpoint_to_resume(value: str | bool | None, output_dir: str) -> str | bool | None:
    """Return the checkpoint for `--resume_from_checkpoint`: a folder, or for `true` the newest whole one, if any.

    Raises:
        ValueError: if the folder does not exist, a file in it is damaged, or `output_dir` holds a run that would be
            overwritten.
    """
    finish_replacements(Path(output_dir))
    if value is None or str(value).lower() == "false":
        if (found := newest_whole_checkpoint(Path(output_dir))) is not None:
            raise UserError(
                f"--output_dir {output_dir} holds a run that reached {found}. Resume it with "
                "--resume_from_checkpoint true, choose another --output_dir, or delete this one."
            )
        return None
    if str(value).lower() == "true":
        return True
    folder = Path(str(value))
    finish_replacements(folder.parent)
    if not folder.is_dir():
        raise UserError(
            f"--resume_from_checkpoint {value}: no such folder. `true` takes the newest one in output_dir, if any."
        )
    check_checkpoint(folder)
    return str(value)


def check_checkpoint(folder: Path) -> None:
    """Check that the files of a checkpoint are complete, as far as possible without reading them.

    Raises:
        ValueError: names the file.
    """
    check_weights(str(folder))
    hint = "Resume from an earlier checkpoint."
    if (state := folder / "trainer_state.json").is_file():
        read_json(state, dict[str, Any], hint)
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]):
        if not zipfile.is_zipfile(path):  # what torch.save writes
            raise UserError(f"{path}: damaged, or not written completely. {hint}")
