"""Adapters of PEFT: finding the base that they belong to, and merging them into it."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from ..errors import UserError
from .end_tokens import adopt_generation_config
from .files import check_weights, explained, is_lost_folder, load_causal_lm
from .pickled_weights import refuse_pickled_weights

# Functions import peft, and what imports it: it takes seconds, for bitsandbytes and torch's compiler among others, and
# most models have no adapter.
if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def is_adapter(name: str) -> bool:
    """Whether an adapter lies at `name` (a folder, or a name on the hub), and no whole model beside it."""
    return _has_adapter(name) and not (Path(name) / "config.json").is_file()


def _has_adapter(name: str) -> bool:
    try:
        return find_adapter_config_file(name) is not None
    except OSError:
        return False


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the model that it belongs to; from [`find_adapter`].

    Attributes:
        name (`str`): folder, or name on the hub.
        base (`str`): the same of its base.
        base_config ([`~transformers.PreTrainedConfig`]): configuration of the base.
        revision (`str`, *optional*): revision of the base.
    """

    name: str
    base: str
    base_config: PreTrainedConfig
    revision: str | None = None

    def tokenizer_source(self) -> tuple[str, str | None]:
        """Name and revision of what has the tokenizer: the adapter, if one was saved with it, or else the base."""
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
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` is the base's.
            trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the base may run.
            allow_pickled_weights (`bool`, *optional*, defaults to `False`): whether the weights may be pickles, see
                [`refuse_pickled_weights`].
            progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

        Raises:
            ValueError: if the adapter does not fit the base, cannot be merged, or leaves weights that are not finite.
        """
        if not allow_pickled_weights:
            refuse_pickled_weights(self.name, with_base=False)  # the base may be another than it names
        check_weights(self.name)
        what = f"the base {self.base!r} of the adapter {self.name!r}"
        options = {"revision": self.revision or "main", "dtype": dtype, "trust_remote_code": trust_remote_code}
        base = load_causal_lm(self.base, what, allow_pickled_weights, **options)
        with warnings.catch_warnings():
            # of what `_untie` takes care of
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
                    f"{parameter.dtype}. Unless a dtype of wider range helps, the adapter is broken."
                )
        return merged

    def _put_on(self, base: "PreTrainedModel") -> "PeftModel":
        from peft import PeftModel

        try:
            with explained(f"the adapter {self.name!r} cannot be loaded"):
                model = PeftModel.from_pretrained(base, self.name)
                # once more for its report: weights without a place are dropped, and missing ones only warned of
                report = model.load_adapter(self.name, "default")
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, RuntimeError | ValueError | KeyError):
                raise
            lines = [line.strip() for line in str(cause).splitlines()]
            problem = f"{cause} is missing" if isinstance(cause, KeyError) else " ".join(lines[:2])
        else:
            # VB-LoRA's layers share one bank, which is saved once
            missing = [key for key in report.missing_keys if "vblora_vector_bank" not in key]
            astray = [*report.unexpected_keys, *missing]
            if not astray:
                return model
            problem = f"{len(astray)} weights are in only one of the two, such as {astray[0]}"
        raise UserError(
            f"the adapter {self.name!r} does not fit {self.base!r}: {problem}\nName the model that it was trained on: "
            f"--model NAME_OR_FOLDER --adapter {self.name}."
        )


def find_adapter(name: str, base: str | None = None, trust_remote_code: bool = False) -> Adapter:
    """Read the configurations of an adapter and its base.

    Args:
        name (`str`): folder, or name on the hub.
        base (`str`, *optional*): folder or name of its base; by default what the adapter's configuration names.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the base may run.

    Raises:
        ValueError: if there is no adapter, it is of a kind that cannot be merged, or there is no base where it, or
            the caller, says.
    """
    config, revision = _read_config(name), None
    if base is None:
        base, revision = config.base_model_name_or_path, config.revision
    if not base or not isinstance(base, str):
        raise UserError(
            f"--adapter {name}: its adapter_config.json names no base. Do so: --model NAME_OR_FOLDER --adapter {name}."
        )
    if _has_adapter(base):  # which transformers would load with it
        raise UserError(
            f"the base {base!r} of the adapter {name!r} is an adapter itself, or there is one beside it. Merge that "
            f"one first and name the result (--model FOLDER --adapter {name}); where it is this same adapter, move "
            "its files to a folder of their own."
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
            f"{reason}\nIf it has moved, or lies on this machine under another name, say so: "
            f"--model NAME_OR_FOLDER --adapter {name}."
        ) from error
    return Adapter(name, base, base_config, revision)


def _read_config(name: str) -> "PeftConfig":
    from peft import PeftConfig, PeftType

    folder = Path(name)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        hint = "Name the folder that training saved to, or one of its checkpoint-N."
        if (folder / "config.json").is_file():
            hint = "This is a whole model, which can be used as it is."
        raise UserError(f"--adapter {name}: there is no adapter_config.json in this folder. {hint}")
    if is_lost_folder(name):
        raise UserError(f"--adapter {name}: there is no such folder.")
    with explained(f"--adapter {name}: the adapter's configuration cannot be read"):
        config = PeftConfig.from_pretrained(name)
    is_prompt = config.is_prompt_learning or config.peft_type in (PeftType.ADAPTION_PROMPT, PeftType.XLORA)
    if is_prompt or getattr(config, "layer_replication", None):
        kind = config.peft_type.value if is_prompt else "LoRA with layer_replication"
        raise UserError(
            f"--adapter {name}: {kind} changes what the layers read or how often they run, not their weights, so that "
            "it cannot be merged into them. Use it through peft's PeftModel."
        )
    return config


def _untie(model: "PeftModel") -> None:
    """Give the head weights of its own where an adapter changes it, or the embeddings that it is tied to.

    Peft merges into the tensor that both share: each would get the change that was learnt for the other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (model.get_output_embeddings(), model.get_input_embeddings())
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    head, embeddings = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if head is not None and head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
