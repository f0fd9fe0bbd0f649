"""How many tokens models take together, and what the limit is called."""

from types import SimpleNamespace

import pytest
from transformers import BloomConfig, Gemma3Config, LlamaConfig

from minillm_trl.errors import UserError
from minillm_trl.models.context import check_longrope, context_limit, longrope_limit, max_context, name_context


def model(limit: int | None, longrope: int | None = None, layers: bool = False) -> SimpleNamespace:
    """A model whose configuration states these limits, in one dict or in one for each kind of layers."""
    config = BloomConfig() if limit is None else LlamaConfig(max_position_embeddings=limit)
    if longrope is not None:
        rope = {"rope_type": "longrope", "original_max_position_embeddings": longrope}
        other = {"rope_type": "llama3", "original_max_position_embeddings": 5}
        config.rope_parameters = {"full": rope, "sliding": other} if layers else rope
    return SimpleNamespace(config=config)


@pytest.mark.parametrize("layers", [False, True])
def test_limits_of_a_configuration(layers: bool):
    assert context_limit(model(None).config) is None
    assert longrope_limit(model(64).config) is None
    assert context_limit(model(64).config) == 64
    assert longrope_limit(model(64, 24, layers).config) == 24
    assert context_limit(model(64, 24, layers).config) == 24
    assert context_limit(model(16, 24, layers).config) == 16
    assert context_limit(model(None, 24, layers).config) == 24


def test_kind_of_layers_with_the_lowest_limit_sets_it():
    config = model(64).config
    kinds = [{"rope_type": "longrope", "original_max_position_embeddings": limit} for limit in (40, 24, 30)]
    config.rope_parameters = dict(zip("abc", kinds, strict=True))
    assert longrope_limit(config) == context_limit(config) == 24


def test_limits_of_the_text_part_of_a_multimodal_model():
    config = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert context_limit(config) == 77


def test_several_models_take_what_each_of_them_takes():
    assert max_context() is None
    assert max_context(model(None), model(None)) is None
    assert max_context(model(None), model(48), model(64)) == 48
    assert max_context(model(64), model(64, 24)) == 24


def test_limit_is_called_by_the_model_that_sets_it():
    original = "original_max_position_embeddings (beyond which LongRoPE rotates otherwise)"
    assert name_context(model(64), model(None)) == "context"
    assert name_context(model(64), model(64, 24)) == name_context(model(64, 24)) == original
    assert name_context(model(16), model(64, 24)) == name_context(model(16, 24)) == "context"
    assert name_context(model(None), model(None)) == "context"


def test_sampling_may_reach_the_limit_of_longrope_but_not_cross_it():
    check_longrope(model(16), 100, 100)
    check_longrope(model(64, 24), 20, 4)
    with pytest.raises(UserError, match=r"A prompt of 21 tokens and max_new_tokens=4 cross .*=24 of SimpleNamespace"):
        check_longrope(model(64, 24), 21, 4)
