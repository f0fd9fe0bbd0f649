"""PEFT adapters: find the base model, and merge the adapter into it."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from ..errors import UserError
from .end_tokens import adopt_generation_config
from .files import check_weights, explained, is_lost_folder, load_causal_lm
from .pickled_weights import refuse_pickled_weights

# Functions import peft only when they need it: with bitsandbytes and torch's compiler that takes seconds, and most
# models have no adapter.
if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def is_adapter(name: str) -> bool:
    """Return whether `name` (a folder, or a name on the hub) holds an adapter and no complete model."""
    return _has_adapter(name) and not (Path(name) / "config.json").is_file()


def refuse_adapter(option: str, student: str) -> None:
    """Check that a student is a whole model.

    Args:
        option (`str`): option that names it.
        student (`str`): name on the hub or folder.

    Raises:
        UserError: if it is an adapter.
    """
    if is_adapter(student):
        raise UserError(
            f"{option} {student} is an adapter, but training starts from a whole model. Merge it first "
            f"(minillm-trl merge --adapter {student} --output_dir FOLDER) and name FOLDER."
        )


def _has_adapter(name: str) -> bool:
    try:
        return find_adapter_config_file(name) is not None
    except OSError:
        return False


@dataclass(frozen=True)
class Adapter:
    """An adapter and its base model; from [`find_adapter`].

    Attributes:
        name (`str`): folder or hub name of the adapter.
        base (`str`): folder or hub name of the base.
        base_config ([`~transformers.PreTrainedConfig`]): configuration of the base.
        revision (`str`, *optional*): revision of the base.
    """

    name: str
    base: str
    base_config: PreTrainedConfig
    revision: str | None = None

    def tokenizer_source(self) -> tuple[str, str | None]:
        """Return name and revision of the tokenizer: with the adapter if one was saved there, otherwise the base's."""
        from .teacher import has_tokenizer

        return (self.name, None) if has_tokenizer(self.name) else (self.base, self.revision)

    def load_merged(
        self,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        allow_pickled_weights: bool = False,
        progress: bool = False,
    ) -> "PreTrainedModel":
        """Load the base and merge the adapter into it.

        Args:
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): dtype of the weights; `"auto"` keeps the
                base's.
            trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the base may run.
            allow_pickled_weights (`bool`, *optional*, defaults to `False`): whether the weights may be pickles, see
                [`refuse_pickled_weights`].
            progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

        Raises:
            ValueError: if the adapter does not fit the base, cannot be merged, or leaves weights that are not finite.
        """
        if not allow_pickled_weights:
            # Not with the base that the adapter names: the caller may have named another, which is checked on loading
            refuse_pickled_weights(self.name, with_base=False)
        check_weights(self.name)
        what = f"the base {self.base!r} of the adapter {self.name!r}"
        options = {"revision": self.revision or "main", "dtype": dtype, "trust_remote_code": trust_remote_code}
        base = load_causal_lm(self.base, what, allow_pickled_weights, **options)
        with warnings.catch_warnings():
            # `_untie` handles tied embeddings
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # `_put_on` raises
            model = self._put_on(base)
            _untie(model)
            try:
                merged = model.merge_and_unload(safe_merge=True, progressbar=progress)
            except (RuntimeError, ValueError) as error:  # a method without merge raises NotImplementedError
                raise UserError(f"the adapter {self.name!r} cannot be merged into {self.base!r}: {error}") from error
        adopt_generation_config(merged, self.name)
        for name, parameter in merged.named_parameters():  # safe_merge does not look at modules_to_save
            if not parameter.isfinite().all():
                raise UserError(
                    f"the adapter {self.name!r} cannot be merged into {self.base!r}: {name} is not finite in "
                    f"{parameter.dtype}. Try a dtype with a wider range; if that does not help, the adapter is broken."
                )
        return merged

    def _put_on(self, base: "PreTrainedModel") -> "PeftModel":
        from peft import PeftModel

        try:
            with explained(f"the adapter {self.name!r} cannot be loaded"):
                model = PeftModel.from_pretrained(base, self.name)
                # Load it again for the report: peft drops unexpected weights and only warns about missing ones
                report = model.load_adapter(self.name, "default")
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, RuntimeError | ValueError | KeyError):
                raise
            lines = [line.strip() for line in str(cause).splitlines()]
            problem = f"{cause} is missing" if isinstance(cause, KeyError) else " ".join(lines[:2])
        else:
            # VB-LoRA saves the vector bank that its layers share only once
            missing = [key for key in report.missing_keys if "vblora_vector_bank" not in key]
            unmatched = [*report.unexpected_keys, *missing]
            if not unmatched:
                return model
            problem = f"{len(unmatched)} weights are in only one of the two, such as {unmatched[0]}"
        raise UserError(
            f"the adapter {self.name!r} does not fit {self.base!r}: {problem}\nName the model that it was trained on: "
            f"--model NAME_OR_FOLDER --adapter {self.name}."
        )


def find_adapter(name: str, base: str | None = None, trust_remote_code: bool = False) -> Adapter:
    """Read the configurations of an adapter and its base.

    Args:
        name (`str`): folder or hub name of the adapter.
        base (`str`, *optional*): folder or hub name of the base; by default the one in the adapter's configuration.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the base may run.

    Raises:
        ValueError: if there is no adapter, its kind cannot be merged, or its base cannot be found.
    """
    config, revision = _read_config(name), None
    if base is None:
        base, revision = config.base_model_name_or_path, config.revision
    if not base or not isinstance(base, str):
        raise UserError(
            f"--adapter {name}: its adapter_config.json names no base. Name one: --model NAME_OR_FOLDER --adapter "
            f"{name}."
        )
    if _has_adapter(base):  # transformers would load that adapter too
        raise UserError(
            f"the base {base!r} of the adapter {name!r} is an adapter itself, or its folder also holds an adapter. "
            f"Merge that adapter first and name the result (--model FOLDER --adapter {name}); if it is the same "
            "adapter, move its files to a folder of their own."
        )
    problem = f"the base {base!r} of the adapter {name!r} cannot be loaded"
    try:
        with explained(problem):
            base_config = AutoConfig.from_pretrained(
                base, revision=revision or "main", trust_remote_code=trust_remote_code
            )
    except UserError as error:
        reason = f"{problem}: there is no such folder." if is_lost_folder(base) else error
        raise UserError(
            f"{reason}\nIf the base has moved or has another name on this machine, name it: --model NAME_OR_FOLDER "
            f"--adapter {name}."
        ) from error
    return Adapter(name, base, base_config, revision)


def _read_config(name: str) -> "PeftConfig":
    from peft import PeftConfig, PeftType

    folder = Path(name)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        hint = "Name the folder that training saved to, or a checkpoint-N inside it."
        if (folder / "config.json").is_file():
            hint = "It holds a complete model: use it without --adapter."
        raise UserError(f"--adapter {name}: there is no adapter_config.json in this folder. {hint}")
    if is_lost_folder(name):
        raise UserError(f"--adapter {name}: there is no such folder.")
    with explained(f"--adapter {name}: the adapter's configuration cannot be read"):
        config = PeftConfig.from_pretrained(name)
    is_prompt = config.is_prompt_learning or config.peft_type in (PeftType.ADAPTION_PROMPT, PeftType.XLORA)
    if is_prompt or getattr(config, "layer_replication", None):
        kind = config.peft_type.value if is_prompt else "LoRA with layer_replication"
        raise UserError(
            f"--adapter {name}: {kind} cannot be merged into the weights, since it changes the inputs of layers or "
            "how often they run. Use it through peft's PeftModel."
        )
    return config


def _untie(model: "PeftModel") -> None:
    """Copy the tied weights of the head if an adapter changes the head or the embeddings.

    peft merges into the shared tensor, so each of the two would also get the change that was learnt for the other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()  # annotated as a plain module
    layers = (base.get_output_embeddings(), base.get_input_embeddings())
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return

    def base_layer(layer: Any) -> Any:
        return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer

    head, embeddings = map(base_layer, layers)
    if head is not None and head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
