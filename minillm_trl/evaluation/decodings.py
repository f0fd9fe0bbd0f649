"""Ways to decode an evaluation: sampling at a temperature, or greedily. Each has a folder for its results."""

import math
from dataclasses import dataclass

from ..errors import UserError

GREEDY = "greedy"
VALIDATION = "validation"  # folder with the results on the validation split
_PREFIX = "temperature_"


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded.

    Attributes:
        temperature (`float`, *optional*): sampling temperature; None for greedy decoding.

    Raises:
        ValueError: if the temperature is not a positive number.
    """

    temperature: float | None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"A temperature must be a positive number, got {self.temperature}.")

    @property
    def folder(self) -> str:
        """Name of the folder with the results: `temperature_0.7` or `greedy`."""
        return GREEDY if self.temperature is None else f"{_PREFIX}{self.temperature}"

    def __str__(self) -> str:
        return "greedy decoding" if self.temperature is None else f"temperature {self.temperature:g}"


PAPER = Decoding(1.0)  # the paper's protocol


def is_reserved(name: str) -> bool:
    """Return whether a folder of this name may hold the results of a decoding, so that no task can have it."""
    return name in (GREEDY, VALIDATION) or name.startswith(_PREFIX)
