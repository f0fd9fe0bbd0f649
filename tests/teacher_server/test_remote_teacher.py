"""Training with a teacher on servers: the same run as with a local teacher, and what is refused before it."""

import asyncio
import math
from collections import Counter

import pytest
import torch
from aiohttp import web
from conftest import build_model, build_tokenizer
from served import own_app, serving, vllm_app
from test_trainer import DATASET, make_config, weights

from minillm_trl import MiniLLMTrainer
from minillm_trl.errors import UserError
from minillm_trl.teacher_server.identity import Scoring, TeacherServerError
from minillm_trl.teacher_server.protocol import Row
from minillm_trl.teacher_server.server_pool import ServerPool

VOCAB = 300

GIVEN = {
    "prompt_ids": torch.tensor([[1, 5, 6], [7, 8, 9]]),
    "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    "completion_ids": torch.tensor([[10, 11, 0], [12, 0, 1]]),
    "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}


@pytest.fixture(scope="module")
def teacher():
    return build_model("gpt2", len(build_tokenizer()), 1, width=48)


@pytest.fixture(scope="module")
def server(teacher):
    with serving(own_app(teacher)) as url:
        yield url


def make_trainer(tmp_path, teacher_model=None, *, tokenizer=None, dataset=DATASET, lm_dataset=None, **options):
    tokenizer = tokenizer or build_tokenizer()
    # Adam would turn the rounding of gradients near zero into whole steps
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    options = {"teacher_mixed_alpha": 0.0, "max_steps": 3, **sgd, **options}
    return MiniLLMTrainer(
        build_model("gpt2", len(tokenizer), 0),
        teacher_model,
        args=make_config(tmp_path, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        lm_dataset=lm_dataset,
    )


def log_of(trainer) -> list[dict[str, float]]:
    timing = ("time", "runtime", "per_second", "seconds")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timing)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_server_tokens": "teacher"},
        {"reward_estimator": "expected", "advantage_baseline": "position"},
        {"temperature": 0.7, "teacher_hidden_states": "cpu", "num_iterations": 2, "sampling_batch_size": 3},
    ],
    ids=["plain", "teacher's tokens", "expected", "temperature"],
)
def test_the_whole_vocabulary_gives_the_run_of_a_local_teacher(tmp_path, teacher, server, options):
    of_server = {"teacher_server_tokens"} & options.keys()
    local = make_trainer(
        tmp_path / "local", teacher, **{name: value for name, value in options.items() if name not in of_server}
    )
    remote = make_trainer(
        tmp_path / "remote",
        teacher_server_url=server,
        teacher_server_top_k=VOCAB,
        teacher_server_batch_size=3,
        **options,
    )
    local.train()
    remote.train()
    torch.testing.assert_close(weights(remote), weights(local), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(log_of(remote), log_of(local), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)


def test_a_part_of_the_vocabulary_keeps_rewards_and_bounds_the_single_step(tmp_path, teacher, server):
    local, some, few = (
        make_trainer(tmp_path / name, given, **options)
        for name, given, options in [
            ("local", teacher, {}),
            ("some", None, {"teacher_server_url": server, "teacher_server_top_k": 64}),
            ("few", None, {"teacher_server_url": server, "teacher_server_top_k": 2}),
        ]
    )
    for trainer in (local, some, few):
        trainer.train()
    (full, *_), (close, *_), (rough, *_) = map(log_of, (local, some, few))
    for name in ("objective/long_term", "completions/mean_length"):
        assert close[name] == pytest.approx(full[name], rel=1e-3, abs=1e-5)
    assert rough["objective/single_step"] < close["objective/single_step"] < full["objective/single_step"]


def test_evaluation_and_given_rollouts_are_scored_by_the_server(tmp_path, teacher, server):
    local = make_trainer(tmp_path / "local", teacher).score_rollouts(**GIVEN)
    trainer = make_trainer(tmp_path / "remote", teacher_server_url=server, teacher_server_top_k=5)
    remote = trainer.score_rollouts(**GIVEN)
    torch.testing.assert_close(remote["advantages"], local["advantages"], rtol=1e-4, atol=1e-5)
    metrics = trainer.evaluate(DATASET.select(range(4)))
    assert metrics["eval_objective/single_step"] > 0


def plain_logits(model, row: int) -> torch.Tensor:
    """Return the logits that predict each token of a completion of GIVEN, by a plain forward pass without padding."""
    prompt, length = GIVEN["prompt_ids"][row][GIVEN["prompt_mask"][row].bool()], GIVEN["completion_mask"][row].sum()
    ids = torch.cat([prompt, GIVEN["completion_ids"][row][:length]])
    with torch.no_grad():
        return model.eval()(ids[None]).logits[0, len(prompt) - 1 : -1].double()


def merged_kl(student, teacher, listed: list[list[list[int]]]) -> float:
    """Return the mean over tokens of the reverse KL in which all tokens that are not listed are one outcome."""
    totals = []
    for row, tokens in enumerate(listed):
        for place, names in enumerate(tokens):
            q, p = (plain_logits(model, row)[place].softmax(-1) for model in (student, teacher))
            names = sorted({*names, int(GIVEN["completion_ids"][row, place])})
            others = [token for token in range(len(q)) if token not in names]
            q, p = (torch.cat([each[names], each[others].sum()[None]]) for each in (q, p))
            totals.append(float((q * (q / p).log()).sum()))
    return sum(totals) / len(totals)


@pytest.mark.parametrize("estimator", ["sampled", "expected"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_listed_tokens_are_those_of_the_student_that_sampled_or_of_the_teacher(
    tmp_path, teacher, server, whose, estimator
):
    options = {"teacher_server_url": server, "teacher_server_top_k": 5, "teacher_server_tokens": whose}
    trainer = make_trainer(tmp_path, reward_estimator=estimator, **options)
    source = trainer.model if whose == "student" else teacher
    listed = [[names.topk(5).indices.tolist() for names in plain_logits(source, row)] for row in range(2)]
    batch = trainer.score_rollouts(**GIVEN)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as the updates of a buffer do, which keep the list
        for values in trainer.model.parameters():
            values += 0.3 * values.abs().mean() * torch.randn(values.shape, generator=generator)
    loss = trainer.compute_loss(trainer.model, {**batch, "advantages": torch.zeros_like(batch["advantages"])})
    assert loss.item() == pytest.approx(merged_kl(trainer.model, teacher, listed), rel=1e-4)
    assert plain_logits(trainer.model, 0).topk(5).indices.tolist() != listed[0]


def test_the_students_tokens_are_listed_by_default(tmp_path, teacher, server):
    assert make_trainer(tmp_path, teacher_server_url=server)._teacher.student_top_k == 64
    with serving(vllm_app(teacher, tokenize=build_tokenizer().encode)) as url:
        vllm = {"teacher_server_url": url, "teacher_server_top_k": 5}
        assert make_trainer(tmp_path, **vllm)._teacher.student_top_k == 0
        with pytest.raises(UserError, match=r"teacher_server_tokens='student'.*vLLM"):
            make_trainer(tmp_path, teacher_server_tokens="student", **vllm)


@pytest.mark.parametrize("protocol", [None, 3])
def test_a_server_of_another_version_is_refused(tmp_path, teacher, protocol):
    async def info(request: web.Request) -> web.Response:
        versions = {} if protocol is None else {"protocol": protocol}
        return web.json_response({"server": "minillm-trl", "model": "the-teacher", "vocab_size": VOCAB, **versions})

    app = web.Application()
    app.add_routes([web.get("/info", info)])
    with serving(app) as url, pytest.raises(TeacherServerError, match="same version of minillm-trl"):
        make_trainer(tmp_path, teacher_server_url=url)


class TestSeveralServers:
    def test_they_share_the_rows_and_one_may_die(self, tmp_path, teacher):
        counts: Counter[str] = Counter()

        def counting(name: str, dies: bool) -> web.Application:
            app = own_app(teacher)

            @web.middleware
            async def count(request, handler):
                if request.path == "/score":
                    counts[name] += 1
                    await asyncio.sleep(0.01)  # the other one takes a batch meanwhile
                    if dies and counts[name] > 2:
                        request.transport.close()
                return await handler(request)

            app.middlewares.insert(0, count)
            return app

        options = {"teacher_server_batch_size": 1, "teacher_server_top_k": 20}
        with serving(counting("a", False)) as a, serving(counting("b", True)) as b:
            both = make_trainer(tmp_path / "both", teacher_server_url=[a, b], **options)
            both._teacher.served.pool.wait = lambda retries: 0.01
            both.train()
            one = make_trainer(tmp_path / "one", teacher_server_url=a, **options)
            one.train()
        assert min(counts.values()) > 2
        assert torch.equal(weights(both), weights(one))

    def test_they_serve_the_same_model(self, tmp_path, teacher, server):
        with (
            serving(own_app(build_model("gpt2", VOCAB, 2))) as other,
            pytest.raises(TeacherServerError, match="Serve the same model"),
        ):
            make_trainer(tmp_path, teacher_server_url=[server, other])


class TestFailure:
    """Servers that die in the middle of a run."""

    @pytest.mark.parametrize("overlap_rollouts", [False, True])
    def test_the_run_saves_its_last_step_and_resumes_exactly(self, tmp_path, teacher, overlap_rollouts: bool):
        allowed = [math.inf]
        app = own_app(teacher)

        @web.middleware
        async def fail(request, handler):
            if request.path == "/score":
                allowed[0] -= 1
                if allowed[0] < 0:
                    raise web.HTTPServiceUnavailable(text="gone")
            return await handler(request)

        app.middlewares.insert(0, fail)
        options = {"max_steps": 8, "teacher_server_retries": 0, "logging_steps": 3, "optim": "adamw_torch"}
        options["overlap_rollouts"] = overlap_rollouts
        with serving(app) as url:
            undisturbed = make_trainer(tmp_path / "a", teacher_server_url=url, **options)
            undisturbed.train()
            stopped = make_trainer(tmp_path / "b", teacher_server_url=url, **options)
            allowed[0] = 3  # of four rollouts
            with pytest.raises(TeacherServerError, match=r"HTTP 503.*gone.*checkpoint-6"):
                stopped.train()
            allowed[0] = math.inf
            resumed = make_trainer(tmp_path / "b", teacher_server_url=url, **options)
            resumed.train(resume_from_checkpoint=True)
        assert torch.equal(weights(resumed), weights(undisturbed))
        assert log_of(resumed)[:-1] == log_of(undisturbed)[:-1]

    def test_a_short_outage_is_waited_for(self, teacher):
        failures = [2]
        app = own_app(teacher)

        @web.middleware
        async def fail(request, handler):
            if request.path == "/score" and failures[0] > 0:
                failures[0] -= 1
                raise web.HTTPInternalServerError(text="busy")
            return await handler(request)

        app.middlewares.insert(0, fail)
        waits: list[int] = []

        def wait(retries: int) -> float:
            waits.append(retries)
            return 0.01

        with serving(app) as url:
            pool = ServerPool([url], wait=wait)
            identity = pool.connect()
            (state,) = pool.score([Row([5], [6, 7])], Scoring(3, 1.0, VOCAB, identity))
        assert waits == [0, 1]
        assert state.shape == (2, 9)


class TestVllm:
    def test_rewards_are_exact_and_the_single_step_close(self, tmp_path, teacher, server):
        options = {"teacher_server_top_k": 20, "max_steps": 2}
        encode = build_tokenizer().encode
        with serving(vllm_app(teacher, tokenize=encode)) as url:
            vllm = make_trainer(tmp_path / "vllm", teacher_server_url=f"{url}/v1/", **options)
            vllm.train()
        ours = make_trainer(tmp_path / "ours", teacher_server_url=server, teacher_server_tokens="teacher", **options)
        ours.train()
        torch.testing.assert_close(weights(vllm), weights(ours), rtol=1e-3, atol=1e-5)

    def test_other_tokenizer_is_refused(self, tmp_path, teacher):
        with (
            serving(vllm_app(teacher, tokenize=lambda text: list(map(ord, text)))) as url,
            pytest.raises(UserError, match="another tokenizer"),
        ):
            make_trainer(tmp_path, teacher_server_url=url, teacher_server_top_k=20)

    def test_too_many_tokens_and_other_temperatures_are_refused(self, tmp_path, teacher):
        with serving(vllm_app(teacher)) as url:
            with pytest.raises(TeacherServerError, match="greater than max allowed: 20"):
                make_trainer(tmp_path, teacher_server_url=url, teacher_server_top_k=21)
            with pytest.raises(UserError, match="temperature"):
                make_trainer(tmp_path, teacher_server_url=url, teacher_server_top_k=20, temperature=0.5)

    def test_more_tokens_than_there_are_would_stop_the_server(self, tmp_path, teacher):
        options = {"teacher_server_retries": 0, "max_steps": 1}
        with serving(vllm_app(teacher, max_logprobs=400)) as url:
            with pytest.raises(UserError, match=f"teacher_server_top_k={VOCAB + 1}, .* {VOCAB} tokens"):
                make_trainer(tmp_path, teacher_server_url=url, teacher_server_top_k=VOCAB + 1, **options)
            make_trainer(tmp_path, teacher_server_url=url, teacher_server_top_k=VOCAB, **options).train()


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("teacher_mixed_alpha", 0.2),
            ("lm_kd_ratio", 0.5),
            ("skd_top_k", 5),
            ("single_step_divergence", "entropy_aware_kl"),
            ("teacher_hidden_states", "recompute"),
            ("offload_teacher", True),
            ("shard_teacher", True),
            ("teacher_shares_base", True),
            ("teacher_model_init_kwargs", {"dtype": "float32"}),
            ("kd_temperature", 0.5),
            ("teacher_server_top_k", 0),
            ("teacher_server_tokens", "nobody"),
            ("teacher_server_retries", -1),
            ("teacher_server_url", ["http://a:1", "http://a:1/"]),
            ("teacher_server_url", ["ftp://a:1"]),
            ("teacher_server_url", ["http://key@a:1"]),
        ],
    )
    def test_settings_that_do_not_work_with_a_server(self, tmp_path, name, value):
        options = {"teacher_server_url": "http://127.0.0.1:1", "teacher_mixed_alpha": 0.0, name: value}
        with pytest.raises(UserError, match=name):
            make_config(tmp_path, **options)

    def test_settings_of_servers_without_one(self, tmp_path):
        with pytest.raises(UserError, match="teacher_server_top_k"):
            make_config(tmp_path, teacher_server_top_k=5)

    def test_no_teacher_and_two_teachers(self, tmp_path, teacher, server):
        with pytest.raises(UserError, match="missing"):
            make_trainer(tmp_path)
        with pytest.raises(UserError, match="both"):
            make_trainer(tmp_path, teacher, teacher_server_url=server)

    def test_other_tokenizer(self, tmp_path, server):
        with pytest.raises(UserError, match="another tokenizer"):
            make_trainer(tmp_path, tokenizer=build_tokenizer(280), teacher_server_url=server)

    def test_a_server_that_does_not_answer(self, tmp_path):
        with pytest.raises(TeacherServerError, match="No teacher server answers"):
            make_trainer(tmp_path, teacher_server_url="http://127.0.0.1:9", teacher_server_retries=0)

    def test_a_missing_and_a_given_key(self, tmp_path, teacher, monkeypatch):
        with serving(own_app(teacher, api_key="secret")) as url:
            with pytest.raises(TeacherServerError, match="TEACHER_SERVER_API_KEY"):
                make_trainer(tmp_path, teacher_server_url=url)
            monkeypatch.setenv("TEACHER_SERVER_API_KEY", "secret")
            make_trainer(tmp_path, teacher_server_url=url)


def test_a_server_that_changes_its_model_ends_the_run(tmp_path, teacher):
    app = own_app(teacher)
    with serving(app) as url:
        pool = ServerPool([url], max_retries=0)
        identity = pool.connect()
        trainer = make_trainer(tmp_path, teacher_server_url=url)
        trainer._teacher.scoring = trainer._teacher.served.scoring(VOCAB)
        object.__setattr__(trainer._teacher.scoring.identity, "fingerprint", "0" * 64)
        assert identity.fingerprint != "0" * 64
        with pytest.raises(TeacherServerError, match="another model"):
            trainer.train()
