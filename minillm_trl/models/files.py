"""Check and load the files of a model, with messages that name the file that cannot be used."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from ..errors import UserError
from .pickled_weights import refuse_pickled_weights

if TYPE_CHECKING:  # importing it takes seconds, and reading a tokenizer does not need it
    from transformers import PreTrainedModel

_PICKLED = (
    "the file with the weights (.bin) is a pickle that is damaged or holds more than tensors. It was not unpickled, "
    "since that can run any code. Get the model as .safetensors, or convert it yourself if you trust it."
)


def is_lost_folder(name: str) -> bool:
    """Return whether a name can only mean a folder that does not exist: hub names are `NAME` or `OWNER/NAME`."""
    is_path = name.startswith((".", "/", "~")) or name.rstrip("/").count("/") > 1 or name.endswith("/")
    return (is_path or Path(name).is_absolute()) and not Path(name).is_dir()


def check_weights(name: str) -> None:
    """Check that the weight files in a folder are complete, without reading the weights; a hub name passes.

    Raises:
        ValueError: naming the file.
    """
    files = sorted(Path(name).glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or incomplete ({error}). Copy or save it again.") from error
    if files:
        return  # safetensors are loaded even if there are pickles too
    for path in sorted([*Path(name).glob("pytorch_model*.bin"), *Path(name).glob("adapter_model.bin")]):
        try:
            torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: {_PICKLED}") from error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a library's error about the files of a model into a message that names the model.

    Damaged files make libraries raise anything, down to a bare `Exception`. Put only a single library call into the
    block, so that our own errors are not reported as damaged files.

    Args:
        what (`str`): beginning of the message: what cannot be loaded, and from where.

    Raises:
        ValueError: for every error except a full GPU, `KeyboardInterrupt` and the like.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{what}: {_PICKLED}") from error
    except BaseException as error:
        # tokenizers' Rust code raises a PanicException, which is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error)[:2000] if type(error) in (OSError, ValueError) else _shown(error)
        raise UserError(f"{what}: {reason}") from error


def load_causal_lm(name: str, what: str, allow_pickled_weights: bool = False, **options: Any) -> "PreTrainedModel":
    """Load a causal language model, and refuse missing weights, which transformers would initialise at random.

    Args:
        name (`str`): folder, or name on the hub.
        what (`str`): the model as messages call it.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`): whether the weights may be pickles, see
            [`refuse_pickled_weights`].
        **options: arguments of `from_pretrained`.

    Raises:
        ValueError: if the files cannot be used, or weights are missing or have the wrong shape.
    """
    if not allow_pickled_weights:
        refuse_pickled_weights(name, options)
        options["use_safetensors"] = True
    check_weights(name)
    with explained(f"{what} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, report = loaded  # a pair, because of `output_loading_info`
    if unmatched := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise UserError(
            f"{what} lacks {len(unmatched)} of its weights, or has them in another shape, such as {unmatched[0]}. Its "
            "weight files do not match its config.json, or are incomplete. Copy or save the model again."
        )
    return model


def check_model_folder(output: Path, sources: Mapping[str, str], overwrite: bool) -> None:
    """Check that a model can be saved to a folder.

    Args:
        output (`Path`): the folder, resolved.
        sources (`Mapping[str, str]`): what it is made from: names or folders by what messages call them.
        overwrite (`bool`): whether a model that is there already is replaced.

    Raises:
        ValueError: if it is a file, not empty, or overlaps with the folder of a source.
    """
    for role, source in sources.items():
        if not Path(source).is_dir():
            continue
        folder = Path(source).resolve()
        if output == folder or output in folder.parents or folder in output.parents:
            raise UserError(
                f"--output_dir {output}: this folder and that of the {role}, {folder}, are the same, or one lies in "
                "the other. Name another folder."
            )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: this is a file. Name a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output_dir {output}: this folder is not empty. Name another, or add --overwrite.")
    if not (output / "config.json").is_file():
        raise UserError(
            f"--output_dir {output}: --overwrite replaces a whole folder, and this one holds no model (there is no "
            "config.json). Name another."
        )


def _shown(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}\nIts files are damaged or hold invalid values."
