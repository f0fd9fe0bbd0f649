"""SeqKD's answers by vLLM itself, on a CPU: they follow the teacher and do not depend on the batch."""

from test_seqkd import config
from vllm_on_cpu import build_word_model, build_word_tokenizer, law, needs_vllm, record, save_student, surprise

from minillm_trl.baselines.seqkd import sample_with_vllm

pytestmark = needs_vllm

HORIZON = 3


def test_answers_follow_the_teacher_and_their_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process takes minutes to start
    tokenizer = build_word_tokenizer()
    args = config(
        tmp_path / "out",
        use_vllm=True,
        max_completion_length=HORIZON,
        teacher_model_init_kwargs={"dtype": "float32", "max_model_len": 32, "enforce_eager": True},
    )
    sample = sample_with_vllm(save_student(tmp_path / "teacher"), tokenizer, args, chunk=512)
    jobs = [(0, number) for number in range(2048)]
    prompt = tokenizer("a b")["input_ids"]
    answers = {number: ids for batch in sample(jobs, [prompt] * len(jobs)) for number, ids, _ in batch}
    again = list(sample(jobs[100:110], [prompt] * 10))
    own = surprise([tuple(ids) for ids in answers.values()], law(build_word_model(0), prompt, HORIZON, {0}))
    other = surprise([tuple(ids) for ids in answers.values()], law(build_word_model(1), prompt, HORIZON, {0}))
    record("seqkd", {"samples": len(jobs), "distance_to_own_law": own, "distance_to_the_law_of_another_model": other})
    assert abs(own) < 5 < other
    assert [[ids for _, ids, _ in batch] for batch in again] == [[answers[number] for number in range(100, 110)]]
    assert all(finished == (ids[-1] == 0) for batch in again for _, ids, finished in batch)
