"""The best checkpoint is the one with the better value, larger or smaller as the metric has it."""

import pytest
from test_kd import make_args
from test_trainer import DATASET, make_config, make_trainer

from minillm_trl.baselines import FineTuningConfig, KDConfig
from minillm_trl.training.metric_directions import _DIRECTIONS, _known, greater_is_better
from minillm_trl.training.metric_names import FINE_TUNING, KD, MINILLM


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("eval_objective/reverse_kl", False),
        ("objective/reverse_kl_per_token", False),
        ("eval_kl", False),
        ("eval_dolly_kl", False),
        ("eval_self_inst_objective/reverse_kl", False),
        ("eval_loss", False),
        ("eval_dolly_loss", False),
        ("eval_kd/forward_kl", False),
        ("rollout/repeated_4grams", False),
        ("eval_rouge_l", True),
        ("eval_dolly_rouge_l", True),
        ("eval_rollout/eos_rate", True),
        ("eval_rewards/helpful_kl/mean", True),
        ("eval_my_own_score", None),
        (None, None),
    ],
)
def test_direction_is_that_of_the_metric(metric: str | None, expected: bool | None):
    assert greater_is_better(metric, None) is expected
    assert greater_is_better(metric, expected) is expected
    if expected is not None:
        better = "larger" if expected else "smaller"
        contradiction = f"greater_is_better={not expected} contradicts .*{metric}.* {better} values are better"
        with pytest.raises(ValueError, match=contradiction):
            greater_is_better(metric, not expected)


@pytest.mark.parametrize("metric", ["eval_entropy", "eval_dolly_entropy", "completions/mean_terminated_length"])
def test_metric_without_a_direction_needs_one(metric: str):
    with pytest.raises(ValueError, match=f"{metric}.*Set greater_is_better"):
        greater_is_better(metric, None)
    assert greater_is_better(metric, True) is True
    assert greater_is_better(metric, False) is False


def test_every_metric_of_the_subcommands_is_known():
    assert [name for name in MINILLM | FINE_TUNING | KD if _known(name) is None] == []
    assert _DIRECTIONS[_known("eval_objective/reverse_kl_per_token")] is False


def test_configurations_have_the_direction(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    for config in (FineTuningConfig, KDConfig):
        args = make_args(config, tmp_path, **evaluated, metric_for_best_model="eval_kd/forward_kl")
        assert args.greater_is_better is False
        with pytest.raises(ValueError, match="greater_is_better=True contradicts"):
            make_args(config, tmp_path, metric_for_best_model="eval_kd/forward_kl", greater_is_better=True)
    assert make_config(tmp_path, metric_for_best_model="eval_objective/reverse_kl").greater_is_better is False
    with pytest.raises(ValueError, match="greater_is_better=False contradicts"):
        make_config(tmp_path, metric_for_best_model="eval_rouge_l", greater_is_better=False)


def test_best_checkpoint_is_the_one_with_the_lowest_reverse_kl(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=DATASET.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_objective/reverse_kl",
    )
    trainer.train()
    name = "eval_objective/reverse_kl"
    found = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
    assert len(set(found.values())) == 3
    assert trainer.state.best_metric == min(found.values())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(found, key=found.get)}")
