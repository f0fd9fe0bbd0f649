"""The keys of a turn's random numbers: none is used twice, and the number of processes does not matter."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from minillm_trl.rollouts.coins import row_coin_keys
from minillm_trl.rollouts.keyed_random import COINS, evaluation_key
from minillm_trl.training.prompt_order import EpochRepeatSampler
from minillm_trl.training.turns import Turn, make_turn, next_turn

ROWS, EVAL_ROWS = 6, 5  # of a process: three micro-batches of two, or a batch of an evaluation


def turn(process: int, step: int, number: int, rows: int = ROWS, *, training: bool = True, **options: bool) -> Turn:
    """The turn of a trainer on one process, with `shared_coins` and a teacher that is sharded or not."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            seed=7,
            per_device_train_batch_size=rows // 3,
            eval_batch_size=EVAL_ROWS,
            shared_coins=options.get("shared"),
        ),
        accelerator=SimpleNamespace(process_index=process),
        model=SimpleNamespace(training=training),
        buffer=SimpleNamespace(micro_batches=3),
        num_generations_eval=4,
        _teacher=SimpleNamespace(is_sharded=options.get("sharded", False)),
    )
    return make_turn(trainer, [[5, row // 4] for row in range(rows)], 5, step, number)


PLACES = [(process, step, number) for process in range(3) for step in (0, 1, 4) for number in range(3)]


@pytest.mark.parametrize("shared", [True, False])
def test_no_key_is_used_twice(shared: bool):
    used = []
    for place in PLACES:
        made = turn(*place, shared=shared)
        used += made.keys
        if shared:  # the number of the batch completes the key
            used += [(*made.coin_key, batch) for batch in range(2)]
        else:
            used += row_coin_keys(made.coin_key, 0, made.keys)
    assert len(set(used)) == len(used) == len(PLACES) * (ROWS + (2 if shared else ROWS))


def test_processes_have_the_keys_of_one_that_has_all_rows():
    one, (first, second) = turn(0, 3, 1, 2 * ROWS), (turn(process, 3, 1) for process in range(2))
    assert first.keys + second.keys == one.keys
    assert first.coin_key == second.coin_key == one.coin_key


def test_processes_toss_the_same_coins_for_a_sharded_teacher_alone():
    coins = {place: turn(*place, shared=True, sharded=True).coin_key for place in PLACES}
    assert all(coins[place] == coins[0, place[1], place[2]] for place in PLACES)
    assert len(set(coins.values())) == len(PLACES) / 3
    assert turn(0, 0, 0, shared=True).coin_key != turn(1, 0, 0, shared=True).coin_key


def test_coins_of_a_resumed_run_are_those_of_earlier_releases():
    assert turn(1, 3, 2, shared=True).coin_key == (7, COINS, 3, 1, 3)
    assert turn(1, 3, 2, shared=True, sharded=True).coin_key == (7, COINS, 3, 0, 3)
    assert turn(1, 3, 2, shared=False).coin_key == (7, COINS)


def test_evaluation_numbers_the_samples_of_a_prompt_over_all_processes_at_any_step():
    def evaluated(step: int, number: int) -> list[tuple[int, ...]]:
        return [key for process in range(2) for key in turn(process, step, number, EVAL_ROWS, training=False).keys]

    keys = evaluated(4, 0)
    assert [key[3] for key in keys] == [row % 4 for row in range(2 * EVAL_ROWS)]
    assert keys == evaluated(9, 0)
    assert not {*keys} & {*evaluated(4, 1)}
    assert keys[0] == evaluation_key(7, [5, 0])  # as trainers with one sample of a prompt have it
    trained = {key for place in PLACES for key in turn(*place).keys}
    assert not trained & {*keys}


def test_turn_has_its_prompts_limit_and_teachers():
    made = turn(0, 3, 1)
    assert (made.prompt_ids, made.max_new_tokens, made.teacher_index) == (
        [[5, row // 4] for row in range(ROWS)],
        5,
        [],
    )


@pytest.mark.parametrize("teachers", [[], [1, 0]])
def test_batch_is_padded_as_grpo_pads_it(teachers: list[int]):
    turn = Turn([[5, 6], [7]], [(1,), (2,)], (0,), 4, teachers)
    found = turn.batch([[8], [9, 10, 11]], 1, torch.device("cpu"))
    assert {name: values.tolist() for name, values in found.items()} == {
        "prompt_ids": [[5, 6], [1, 7]],
        "prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[8, 1, 1], [9, 10, 11]],
        "completion_mask": [[1, 0, 0], [1, 1, 1]],
        **({"teacher_index": teachers} if teachers else {}),
    }
    assert {values.dtype for values in found.values()} == {torch.int64}


def test_turn_samples_with_what_it_holds():
    turn = Turn([[5, 6]], [(1, 2)], (3,), 4, [1])
    sampler = SimpleNamespace(sample=lambda *arguments: arguments)
    assert turn.sample(sampler, "student") == ("student", [[5, 6]], [(1, 2)], (3,), 4, True, (), [1])
    assert turn.sample(sampler, "student", False, [[7]]) == ("student", [[5, 6]], [(1, 2)], (3,), 4, False, [[7]], [1])


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(("number", "step"), [(1, 2), (2, 4), (4, 8), (4, 9), (4, 10), (4, 11)])
def test_next_turn_has_this_processs_prompts_of_the_next_rollout_until_the_run_ends(
    process: int, number: int, step: int
):
    """A rollout has four rows of each of two processes: four prompts, each twice. An epoch has two rollouts."""
    rows = Dataset.from_dict({"prompt": [f"{row}" for row in range(9)], "teacher": ["one", "two", "two"] * 3})
    order = EpochRepeatSampler(rows, mini_repeat_count=2, batch_size=4, repeat_count=3, seed=7)
    args = {"seed": 7, "per_device_train_batch_size": 2, "shared_coins": False, "teacher_column": "teacher"}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**args, horizon_start=2, horizon_steps=10),
        train_dataset=rows,
        buffer=SimpleNamespace(micro_batches=2, next_rollout=(number, step)),
        state=SimpleNamespace(max_steps=10),
        accelerator=SimpleNamespace(process_index=process),
        model=SimpleNamespace(training=True),
        max_completion_length=12,
        num_generations_eval=1,
        _get_train_sampler=lambda dataset: order,
        _tokenize_prompts=lambda prompts: ([[int(prompt)] for prompt in prompts], None, {}),
        _teacher_names=["one", "two"],
        _teacher=SimpleNamespace(is_sharded=False),
    )
    found = next_turn(trainer)
    if step >= 10:
        assert found is None
        return
    due = order.rollout(number)[4 * process :][:4]
    assert found == make_turn(trainer, [[row] for row in due], 2 + step, step, 0, [min(row % 3, 1) for row in due])
