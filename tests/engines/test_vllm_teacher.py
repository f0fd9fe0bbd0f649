"""A teacher on vLLM's own server, on a CPU: its answers, training with it, and what it refuses."""

import copy

import pytest
import torch
from conftest import build_model, build_tokenizer
from test_remote_teacher import log_of, make_trainer
from test_trainer import weights
from vllm_on_cpu import needs_vllm, record
from vllm_server import serving

from minillm_trl.errors import UserError
from minillm_trl.teacher_server.identity import Scoring, TeacherServerError
from minillm_trl.teacher_server.protocol import Row
from minillm_trl.teacher_server.server_pool import ServerPool
from minillm_trl.teacher_server.top_k import TopK

pytestmark = needs_vllm

VOCAB, CONTEXT, LISTED = 300, 128, 200
ROWS = [Row([5, 6, 7], [8, 9, 259, 0]), Row([259], [271, 281, 260]), Row([9] * 60, [10] * 66)]


@pytest.fixture(scope="module")
def teacher():
    """The tests' llama: vLLM's attention on CPUs needs heads of at least 32 dimensions."""
    return build_model("llama", VOCAB, 1, width=64)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def options(dtype: str, listed: int) -> list[str]:
    return ["--dtype", dtype, "--max-model-len", str(CONTEXT), "--max-logprobs", str(listed)]


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, *options("float32", LISTED)) as url:
        yield url


def differences(url: str, teacher, listed: int) -> dict[str, float]:
    """Compare the server's answers with the model's log-probs; return the largest differences, in nats."""
    pool = ServerPool([url])
    identity = pool.connect()
    assert identity.max_context == CONTEXT - 1
    answers = pool.score(ROWS, Scoring(listed, 1.0, VOCAB, identity))
    tokens, most_likely, rest = [], [], []
    for row, answer in zip(ROWS, answers, strict=True):
        top = TopK.unpack(answer)
        with torch.no_grad():
            logits = teacher(torch.tensor([row.prompt + row.completion])).logits[0]
        local = torch.log_softmax(logits.float(), dim=-1)[len(row.prompt) - 1 : -1]
        completion = torch.tensor(row.completion)[:, None]
        theirs = torch.where(top.ids == completion, top.logps, -torch.inf).amax(dim=1)
        tokens.append((theirs - local.gather(1, completion)[:, 0]).abs().max())
        most_likely.append((top.logps - local.gather(1, top.ids)).abs().max())
        probability = 1 - torch.zeros_like(local).scatter(1, top.ids, local.exp().gather(1, top.ids)).sum(dim=1)
        rest.append((top.rest.exp() - probability).abs().max())
        assert all(
            {*own.topk(listed).indices.tolist()} <= {*ids.tolist()} for own, ids in zip(local, top.ids, strict=True)
        )
    return {"token": float(max(tokens)), "listed": float(max(most_likely)), "rest": float(max(rest))}


def test_scores_equal_the_models_own(server, teacher):
    found = differences(server, teacher, 20)
    record("teacher_float32", {"tokens_listed": 20, **found})
    assert max(found.values()) < 1e-5


def test_scores_in_bfloat16_differ_by_its_rounding(folder, teacher):
    with serving(folder, *options("bfloat16", VOCAB)) as url:
        found = differences(url, copy.deepcopy(teacher).to(torch.bfloat16), VOCAB)
    record("teacher_bfloat16", {"tokens_listed": VOCAB, **found})
    assert max(found.values()) < 0.1


def test_a_run_is_that_of_a_local_teacher(tmp_path, server, teacher):
    """Rewards are exact. The single step is that over the listed tokens, so `serve-teacher` is compared as well."""
    local = make_trainer(tmp_path / "local", teacher, single_step_decomposition=False)
    remote = make_trainer(
        tmp_path / "remote", teacher_server_url=server, teacher_server_top_k=LISTED, single_step_decomposition=False
    )
    for trainer in (local, remote):
        trainer.train()
    difference = float((weights(remote) - weights(local)).abs().max())
    moved = float((weights(local) - weights(make_trainer(tmp_path / "new", teacher))).abs().max())
    rewards = [log["objective/reverse_kl"] for log in log_of(remote) if "objective/reverse_kl" in log]
    record("teacher_run", {"updates": len(rewards), "weight_difference": difference, "largest_change": moved})
    assert len(rewards) == 3
    assert difference < 1e-4 * moved


class TestRefusals:
    def test_more_tokens_than_the_server_lists(self, tmp_path, server):
        with pytest.raises(TeacherServerError, match=f"greater than max allowed: {LISTED}"):
            make_trainer(tmp_path, teacher_server_url=server, teacher_server_top_k=LISTED + 1)

    def test_more_tokens_than_there_are(self, tmp_path, server):
        with pytest.raises(UserError, match="teacher_server_top_k=301"):
            make_trainer(tmp_path, teacher_server_url=server, teacher_server_top_k=VOCAB + 1)

    def test_another_tokenizer(self, tmp_path, server):
        with pytest.raises(UserError, match="another tokenizer"):
            make_trainer(tmp_path, tokenizer=build_tokenizer(280), teacher_server_url=server, teacher_server_top_k=20)

    def test_a_sequence_that_is_too_long(self, server):
        pool = ServerPool([server])
        scoring = Scoring(20, 1.0, VOCAB, pool.connect())
        pool.score([Row([5] * 60, [6] * 67)], scoring)
        with pytest.raises(TeacherServerError, match="HTTP 400"):
            pool.score([Row([5] * 60, [6] * 68)], scoring)
