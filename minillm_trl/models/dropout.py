"""Dropout that modules keep as plain numbers."""

import torch


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch off what GRPOTrainer leaves on: probabilities that modules keep as plain numbers (OPT's, Falcon's)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
