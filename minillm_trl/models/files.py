"""What is said where the files of a model cannot be used."""

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

if TYPE_CHECKING:  # its module takes seconds to import, which reading a tokenizer need not wait for
    from transformers import PreTrainedModel

_PICKLED = (
    "the file with the weights (.bin) is a pickle that is damaged or holds more than tensors. It was not unpickled, "
    "since that can run any code. Get the model as .safetensors, or convert it where you trust it."
)


def is_lost_folder(name: str) -> bool:
    """Whether a name can only be that of a folder, and there is none: names on the hub are `NAME` or `OWNER/NAME`."""
    is_path = name.startswith((".", "/", "~")) or name.rstrip("/").count("/") > 1 or name.endswith("/")
    return (is_path or Path(name).is_absolute()) and not Path(name).is_dir()


def check_weights(name: str) -> None:
    """Check that the files of weights in a folder are whole, without reading them; a name on the hub passes.

    Raises:
        ValueError: naming the file.
    """
    files = sorted(Path(name).glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, or not written whole ({error}). Copy or save it again.") from error
    for path in (
        [] if files else sorted([*Path(name).glob("pytorch_model*.bin"), *Path(name).glob("adapter_model.bin")])
    ):
        try:
            torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: {_PICKLED}") from error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what a library raises over the files of a model into a message that names them.

    Files with damage or odd values make the libraries raise anything, down to a bare `Exception`. So there must be
    nothing but one call of theirs in the block, lest errors of ours be taken for those of the files.

    Args:
        what (`str`): beginning of the message: what cannot be loaded, and from where.

    Raises:
        ValueError: for all errors but that of a full GPU.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{what}: {_PICKLED}") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers' Rust
            raise
        reason = str(error)[:2000] if type(error) in (OSError, ValueError) else _shown(error)
        raise UserError(f"{what}: {reason}") from error


def load_causal_lm(name: str, what: str, allow_pickled_weights: bool = False, **options: Any) -> "PreTrainedModel":
    """Load a causal language model, refusing one whose files lack weights: transformers makes those up.

    Args:
        name (`str`): folder, or name on the hub.
        what (`str`): what messages call it.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`): whether the weights may be pickles, see
            [`refuse_pickled_weights`].
        **options: of `from_pretrained`.

    Raises:
        ValueError: if its files cannot be used, or weights are missing.
    """
    if not allow_pickled_weights:
        refuse_pickled_weights(name, options)
        options["use_safetensors"] = True
    check_weights(name)
    with explained(f"{what} cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if astray := sorted([*found["missing_keys"], *(each[0] for each in found["mismatched_keys"])]):
        raise UserError(
            f"{what} lacks {len(astray)} of its weights, or has them in another shape, such as {astray[0]}. Its files "
            "and its config.json do not belong together, or were not written to their end."
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
    return f"{type(error).__name__}: {text[:400]}\nIts files are damaged, or hold values that do not belong there."
