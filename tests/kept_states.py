"""Hidden states that sampling keeps, compared with plain forward passes."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from minillm_trl.rollouts.sampling import Completions


@torch.no_grad()
def check_kept_states(
    models: Sequence[PreTrainedModel | None],
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    batches: Sequence[tuple[list[int], Completions]],
) -> None:
    """Check the states of student and teacher, which must be None for a model that is None."""
    for rows, sampled in batches:
        for number, row in enumerate(rows):
            ids = torch.tensor([prompts[row] + completions[row]])
            for model, states in zip(models, sampled[2:], strict=True):
                if model is None:
                    assert states is None
                    continue
                expected = model.base_model(ids).last_hidden_state[0, len(prompts[row]) - 1 : -1]
                torch.testing.assert_close(
                    states[number, : len(completions[row])],
                    expected,
                    rtol=1e-3,
                    atol=1e-3 * expected.abs().max().item(),
                )
