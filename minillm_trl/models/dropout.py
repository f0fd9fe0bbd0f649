"""Dropout outside of `torch.nn.Dropout`."""

import copy
import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch off the dropout that GRPOTrainer leaves on.

    Modules keep its probability as a plain number (OPT's, BLOOM's), or read it from their configuration in each
    forward pass (Falcon's). Such a module gets a copy of the configuration. The model's own one stays as it is, and
    is saved so.
    """
    copies: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            # `forward` of most modules reads none: they keep the configuration that they share with the model
            names = inspect.unwrap(type(module).forward).__code__.co_names
            if read := [name for name in names if "drop" in name and isinstance(getattr(config, name, None), float)]:
                own = copies.setdefault(id(config), copy.copy(config))
                for name in read:
                    setattr(own, name, 0.0)
                vars(module)["config"] = own
