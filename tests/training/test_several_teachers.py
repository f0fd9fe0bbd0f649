"""Several teachers: each row learns from its own, as in a run with this teacher alone."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from served import own_app, serving, vllm_app
from test_trainer import PROMPTS, make_config, weights

from minillm_trl import MiniLLMTrainer
from minillm_trl.cli import main
from minillm_trl.errors import UserError
from minillm_trl.rollouts.buffer import sequences
from minillm_trl.training.run_record import RECORD

NAMES = [("math", "code")[number % 3 == 1] for number in range(len(PROMPTS))]
ROWS = Dataset.from_dict({"prompt": PROMPTS, "teacher": NAMES, "references": [["cheap food"]] * len(PROMPTS)})
FIELDS = ("completion_ids", "advantages", "old_per_token_logps", "student_logps", "long_term_weights")


def build_teachers() -> dict:
    """Return teachers of different sizes."""
    tokens = len(build_tokenizer())
    return {"math": build_model("gpt2", tokens, 1, width=48), "code": build_model("gpt2", tokens, 2, width=16)}


def make_trainer(
    tmp_path, teacher_model=None, dataset=ROWS, *, eval_dataset=None, tools=None, reward_funcs=None, **options
):
    tokenizer = build_tokenizer()
    # Adam would turn the rounding of gradients near zero into whole steps
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    return MiniLLMTrainer(
        build_model("gpt2", len(tokenizer), 0),
        teacher_model,
        args=make_config(tmp_path, **{**sgd, "shared_coins": False, **options}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        tools=tools,
        reward_funcs=reward_funcs,
    )


def rollout(trainer) -> dict[str, torch.Tensor]:
    trainer.model.train()
    trainer.eos_token_ids = list(range(0, 60, 2))
    return trainer._generate_and_score_completions([ROWS[row] for row in range(8)])


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_mixed_alpha": 0.0},
        {"teacher_mixed_alpha": 0.0, "reward_estimator": "expected", "sampling_batch_size": 3},
        {"teacher_mixed_alpha": 0.5},
        {"teacher_mixed_alpha": 0.0, "rkl_advantage": False, "skd_top_k": 3, "beta": 0.0},
    ],
    ids=["sampled", "expected", "mixed", "skd"],
)
def test_the_device_holds_one_offloaded_teacher_at_a_time(tmp_path, options):
    trainer = make_trainer(tmp_path, build_teachers(), offload_teacher=True, max_steps=2, **options)
    teachers = trainer._teacher

    def on_the_device() -> list[str]:
        # on a CPU too, an offloaded teacher computes with a copy of its weights
        weights_of = {name: phase.home[0] for name, phase in teachers.phases.items()}
        return [name for name, (weight, home) in weights_of.items() if weight.data_ptr() != home.data_ptr()]

    seen: dict[str, list] = {}
    for name, member in teachers.members.items():
        seen[name] = []
        member.model.base_model.register_forward_pre_hook(
            lambda *_, name=name: seen[name].append(on_the_device())  # it returns None
        )
    trainer.train()
    trainer.evaluate(ROWS.select(range(8)))
    for name, found in seen.items():
        assert found, name
        assert all(names == [name] for names in found), name
    assert on_the_device() == []


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_mixed_alpha": 0.5},
        {"teacher_mixed_alpha": 0.5, "mixing": "speculative", "sampling_batch_size": 3, "kd_temperature": 0.7},
        {"teacher_mixed_alpha": 0.5, "reward_estimator": "expected", "teacher_hidden_states": "cpu"},
        {"teacher_mixed_alpha": 0.0, "reward_estimator": "expected", "sampling_batch_size": 3},
        {"teacher_mixed_alpha": 0.0, "offload_teacher": True},
        {"teacher_mixed_alpha": 0.5, "offload_teacher": True},
        {"teacher_mixed_alpha": 0.0, "teacher_hidden_states": "recompute"},
        {"teacher_mixed_alpha": 0.0, "rkl_advantage": False, "skd_top_k": 3, "beta": 0.0},
    ],
    ids=["coins", "speculative", "expected, mixed", "expected", "offloaded", "offloaded, mixed", "recomputed", "skd"],
)
def test_a_row_has_the_scores_of_a_run_with_its_teacher_alone(tmp_path, options):
    teachers = build_teachers()
    both = make_trainer(tmp_path / "both", dict(teachers), **options)
    found = rollout(both)
    losses = []
    for number, name in enumerate(teachers):
        alone = make_trainer(tmp_path / name, build_teachers()[name], **options)
        expected = rollout(alone)
        rows = found["teacher_index"] == number
        assert 0 < rows.sum() < len(rows)
        mask = sequences(expected)[2][rows]
        length = min(mask.shape[1], found["completion_mask"].shape[1])
        assert not mask[:, length:].any()
        for field in FIELDS:
            ours, theirs = (batch[field][rows][:, :length] for batch in (found, expected))
            torch.testing.assert_close(
                ours.masked_fill(~mask[:, :length], 0), theirs.masked_fill(~mask[:, :length], 0), rtol=1e-4, atol=1e-5
            )
        losses.append((alone, {key: values[rows] for key, values in expected.items()}))
    # the gradient of the whole batch is the sum of those of its parts
    both.args.loss_reduction = "sequence_sum"
    total = gradient(both, found) * len(found["prompt_ids"])
    parts = []
    for alone, batch in losses:
        alone.args.loss_reduction = "sequence_sum"
        parts.append(gradient(alone, batch) * len(batch["prompt_ids"]))
    torch.testing.assert_close(total, sum(parts), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(parts[0], parts[1], rtol=1e-1, atol=1e-3)


def gradient(trainer, batch) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def test_given_rollouts_name_their_teachers(tmp_path):
    batch = {
        "prompt_ids": torch.tensor([[1, 5, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[10, 11, 0], [12, 0, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    both = make_trainer(tmp_path / "both", build_teachers())
    found = both.score_rollouts(**batch, teachers=["code", "math"])
    alone = [
        make_trainer(tmp_path / name, build_teachers()[name]).score_rollouts(**batch) for name in ("code", "math")
    ]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(found["advantages"][row], expected["advantages"][row], rtol=1e-4, atol=1e-5)
    for teachers in (None, ["code"], ["code", "poetry"]):
        with pytest.raises(UserError, match="score_rollouts"):
            both.score_rollouts(**batch, teachers=teachers)
    with pytest.raises(UserError, match="no names of teachers"):
        make_trainer(tmp_path / "one", build_teachers()["code"]).score_rollouts(**batch, teachers=["code", "code"])


def log_of(trainer) -> list[dict[str, float]]:
    timing = ("time", "runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timing)}
        for entry in trainer.state.log_history
    ]


class TestServers:
    def test_they_give_the_run_of_local_teachers(self, tmp_path):
        teachers = build_teachers()
        options = {"teacher_mixed_alpha": 0.0, "max_steps": 3, "reward_estimator": "expected"}
        local = make_trainer(tmp_path / "local", dict(teachers), **options)
        local.train()
        of_servers = {"teacher_server_top_k": 300, "teacher_server_batch_size": 3}
        with serving(own_app(teachers["math"])) as math, serving(own_app(teachers["code"])) as code:
            served = make_trainer(
                tmp_path / "served", teachers={"math": math, "code": [code]}, **options, **of_servers
            )
            served.train()
        torch.testing.assert_close(weights(served), weights(local), rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(log_of(served), log_of(local), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)

    def test_a_server_beside_a_local_teacher(self, tmp_path):
        teachers, tokenizer = build_teachers(), build_tokenizer()
        teachers["math"].save_pretrained(tmp_path / "math")
        tokenizer.save_pretrained(tmp_path / "math")
        options = {"teacher_mixed_alpha": 0.0, "max_steps": 2}
        local = make_trainer(tmp_path / "local", dict(teachers), **options)
        local.train()
        with serving(own_app(teachers["code"])) as code:
            names = {"math": str(tmp_path / "math"), "code": code}
            both = make_trainer(tmp_path / "both", teachers=names, teacher_server_top_k=300, **options)
            both.train()
        torch.testing.assert_close(weights(both), weights(local), rtol=1e-4, atol=1e-6)

    def test_each_server_lists_the_tokens_that_it_can(self, tmp_path):
        teachers = build_teachers()
        options = {"teacher_mixed_alpha": 0.0, "max_steps": 1, "teacher_server_top_k": 5}
        encode = build_tokenizer().encode
        with serving(vllm_app(teachers["math"], tokenize=encode)) as math, serving(own_app(teachers["code"])) as code:
            trainer = make_trainer(tmp_path, teachers={"math": math, "code": code}, **options)
            assert [member.student_top_k for member in trainer._teacher.members.values()] == [0, 5]
            trainer.train()
        assert log_of(trainer)[0]["objective/single_step/math"] > 0

    def test_settings_for_servers_are_checked(self, tmp_path):
        for options in ({"teacher_mixed_alpha": 0.2}, {"teacher_mixed_alpha": 0.0, "offload_teacher": True}):
            with pytest.raises(UserError, match="a server's address in teachers"):
                make_config(tmp_path, teachers={"math": "http://a:1", "code": "folder"}, **options)


def test_metrics_of_each_teacher_make_up_those_of_all(tmp_path):
    trainer = make_trainer(tmp_path, build_teachers(), eval_dataset=ROWS.select(range(9)), eval_strategy="no")
    metrics = trainer.evaluate()
    shares = [NAMES[:9].count(name) / 9 for name in ("math", "code")]
    for metric in ("objective/reverse_kl", "rouge_l"):
        parts = [metrics[f"eval_{metric}/{name}"] for name in ("math", "code")]
        assert metrics[f"eval_{metric}"] == pytest.approx(sum(map(float.__mul__, shares, parts)), rel=1e-5)
    only_math = trainer.evaluate(ROWS.filter(lambda row: row["teacher"] == "math").select(range(3)))
    for metric in ("objective/reverse_kl", "rouge_l"):
        assert f"eval_{metric}/code" not in only_math
        assert only_math[f"eval_{metric}/math"] == pytest.approx(only_math[f"eval_{metric}"], rel=1e-5)
    alone = make_trainer(tmp_path / "alone", build_teachers()["math"])
    same = alone.evaluate(ROWS.filter(lambda row: row["teacher"] == "math").select(range(3)))
    name = "eval_objective/single_step"
    assert only_math[f"{name}/math"] == only_math[name] == pytest.approx(same[name], rel=1e-5)


def test_a_resumed_run_has_the_weights_of_an_undisturbed_one_unless_a_teacher_changes(tmp_path, caplog):
    options = {"max_steps": 6, "steps_per_generation": 4, "save_steps": 3, "save_strategy": "steps"}
    undisturbed = make_trainer(tmp_path / "a", build_teachers(), **options)
    undisturbed.train()
    make_trainer(tmp_path / "b", build_teachers(), **options | {"max_steps": 3}).train()
    resumed = make_trainer(tmp_path / "b", build_teachers(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-3"))
    assert torch.equal(weights(resumed), weights(undisturbed))
    other = build_teachers() | {"code": build_model("gpt2", len(build_tokenizer()), 3)}
    changed = make_trainer(tmp_path / "b", other, **options)
    changed.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-3"))
    assert "rollouts were made with teacher_model=math" in caplog.text
    assert "teacher_model.code: " in caplog.text
    assert "teacher_model.math: " not in caplog.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teachers": {}}, "teachers is empty"),
            ({"teachers": {"a/b": "x"}}, "'a/b'"),
            ({"teachers": {"math": 5}}, r"teachers\['math'\]"),
            ({"teachers": {"math": "x"}, "teacher_server_url": "http://a:1"}, "both given"),
            ({"teachers": {"math": "x"}, "lm_kd_ratio": 0.5}, "lm_kd_ratio"),
            ({"teachers": {"math": "x"}, "cross_tokenizer": True}, "cross_tokenizer"),
            ({"teachers": {"math": "x"}, "shard_teacher": True}, "shard_teacher"),
            ({"teachers": {"math": "x"}, "mixing": "auto"}, "mixing"),
        ],
    )
    def test_settings(self, tmp_path, options, message):
        with pytest.raises(UserError, match=message):
            make_config(tmp_path, **options)

    def test_rows_without_a_known_teacher(self, tmp_path):
        for dataset, message in [
            (ROWS.remove_columns("teacher"), "train_dataset has no column 'teacher'"),
            (ROWS.map(lambda row, i: {"teacher": "maths" if i == 7 else "math"}, with_indices=True), "row 7.*'maths'"),
            (ROWS.rename_column("teacher", "teachers").to_iterable_dataset(), "row 0.*None"),
        ]:
            with pytest.raises(UserError, match=message):
                make_trainer(tmp_path, build_teachers(), dataset)
        with pytest.raises(UserError, match="eval_dataset has no column"):
            make_trainer(tmp_path, build_teachers(), eval_dataset=ROWS.remove_columns("teacher"))
        stream = ROWS.map(lambda row, i: {"teacher": "math" if i < 3 else "x"}, with_indices=True)
        trainer = make_trainer(tmp_path, build_teachers(), stream.to_iterable_dataset(), max_steps=2)
        with pytest.raises(UserError, match="'x'"):
            trainer.train()

    def test_a_teacher_with_another_tokenizer_is_named(self, tmp_path, model_dir):
        build_model("gpt2", 280).save_pretrained(tmp_path / "other")
        build_tokenizer(280).save_pretrained(tmp_path / "other")
        names = {"math": str(model_dir("gpt2", 1)), "code": str(tmp_path / "other")}
        with pytest.raises(UserError, match="Teacher 'code': Student and teacher have different tokenizers"):
            make_trainer(tmp_path, teachers=names)

    def test_arguments(self, tmp_path):
        teachers = build_teachers()
        with pytest.raises(UserError, match="teacher_column"):
            make_trainer(tmp_path, teachers["math"], teacher_column="topic")
        with pytest.raises(UserError, match="both given"):
            make_trainer(tmp_path, teachers["math"], teachers={"math": "x"})
        with pytest.raises(UserError, match=r"args\.teachers"):
            make_trainer(tmp_path, {"math": "http://a:1"})
        with pytest.raises(UserError, match="lm_kd_ratio"):
            make_trainer(tmp_path, teachers, lm_kd_ratio=0.5)
        with pytest.raises(UserError, match="with tools"):
            make_trainer(tmp_path, teachers, tools=[len])


def test_the_same_folder_under_two_names_is_loaded_once(tmp_path, model_dir):
    folder = str(model_dir("gpt2", 1))
    rows = ROWS.rename_column("teacher", "topic")
    trainer = make_trainer(
        tmp_path, teachers={"math": folder, "code": folder}, dataset=rows, teacher_column="topic", max_steps=2
    )
    trainer.train()
    first, second = trainer._teacher.models
    assert first is second


def test_a_yaml_names_the_teachers_and_a_mixture_the_teacher_of_each_part(tmp_path, model_dir, capsys):
    parts = {}
    for name in ("math", "code"):
        parts[name] = tmp_path / f"{name}.jsonl"
        # the same prompts: with different teachers, they are different rows
        parts[name].write_text("".join(json.dumps({"prompt": f"the mill {i}"}) + "\n" for i in range(8)))
    config = tmp_path / "run.yaml"
    entries = "\n".join(f"  - {{path: {path}, teacher: {name}}}" for name, path in parts.items())
    config.write_text(
        f"""model_name_or_path: {model_dir("gpt2", 0)}
teachers: {{math: {model_dir("gpt2", 1, 48)}, code: {model_dir("gpt2", 2)}}}
datasets:
{entries}
test_split_size: 0.25
eval_strategy: steps
eval_steps: 1
metric_for_best_model: eval_objective/reverse_kl/math
output_dir: {tmp_path / "run"}
max_steps: 2
per_device_train_batch_size: 4
steps_per_generation: 2
max_completion_length: 6
use_cpu: true
bf16: false
report_to: none
logging_steps: 1
"""
    )
    assert main(["minillm", "--config", str(config)]) == 0
    assert "objective/reverse_kl/code" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "run" / RECORD).read_text())["attempts"]
    assert {"student", "teacher math", "teacher code"} <= set(record["models"])
    assert record["data"]["train"]["rows"] == 12
    for old, new, message in [
        ("reverse_kl/math", "reverse_kl/maths", "is no metric of an evaluation here. Did you mean 'eval_objective/r"),
        ("teacher: code", "teacher: poetry", "(counting from 0): teacher is 'poetry'"),
    ]:
        broken = tmp_path / "broken.yaml"
        broken.write_text(config.read_text().replace(old, new))
        assert main(["minillm", "--config", str(broken), "--output_dir", str(tmp_path / "again")]) == 2
        assert message in capsys.readouterr().err


def load_recipe():
    """Import the script of the recipe, which lies in a folder that is no package."""
    path = Path(__file__).parents[2] / "recipes/e2e_demo/experts_take_turns.py"
    spec = importlib.util.spec_from_file_location("experts_take_turns", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_outcome_reward_is_the_share_of_the_facts_that_are_named():
    prompts = ["name: The Mill | near: Avalon | food: French\n", "name: Aromi\n"]
    reward = load_recipe().named_facts
    assert reward(prompts=prompts, completions=["The Mill near Avalon.", "Nothing."]) == [2 / 3, 0.0]


def test_an_outcome_reward_adds_to_the_advantage_of_each_rows_teacher(tmp_path):
    def length(prompts, completions, **unused):
        return [float(len(completion)) for completion in completions]

    plain = rollout(make_trainer(tmp_path / "plain", build_teachers()))
    rewarded = rollout(make_trainer(tmp_path / "rewarded", build_teachers(), reward_funcs=[length]))
    mask = sequences(plain)[2]
    assert torch.equal(plain["completion_ids"], rewarded["completion_ids"])
    added = (rewarded["advantages"] - plain["advantages"]).masked_fill(~mask, 0)
    texts = build_tokenizer().batch_decode(
        [row[real] for row, real in zip(plain["completion_ids"], mask, strict=True)]
    )
    lengths = torch.tensor([float(len(text.replace("<eos>", ""))) for text in texts])
    expected = (lengths - lengths.mean()) / lengths.std()
    torch.testing.assert_close(added[:, 0], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_experts_take_turns_and_teach_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_model("gpt2", positions=512).save_pretrained("start")
    build_tokenizer().save_pretrained("start")
    options = ["--student", "start", "--output_dir", "experts", "--rounds", "1", "--steps", "1"]
    load_recipe().main([*options, "--batch_size", "4", "--max_completion_length", "4", "--max_rows", "900"])
    first, second = (load_file(f"experts/round1/{part}/model.safetensors") for part in ("riverside", "elsewhere"))
    assert any((first[name] != second[name]).any() for name in first)
    config = Path(__file__).parents[2] / "recipes/e2e_demo/minillm_several_teachers.yaml"
    teachers = {part: f"experts/round1/{part}" for part in ("riverside", "elsewhere")}
    words = ["--model_name_or_path", "start", "--teachers", json.dumps(teachers)]
    words += ["--dataset_name", "experts/data", "--max_steps", "2", "--eval_steps", "1", "--save_steps", "1"]
    words += ["--per_device_train_batch_size", "4", "--max_completion_length", "4", "--max_eval_rows", "8"]
    assert main(["minillm", "--config", str(config), *words, "--output_dir", "student"]) == 0
