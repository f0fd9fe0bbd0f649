"""Where a run sets its end tokens: the tokenizer, the student, TRL's sampling, and vLLM."""

from types import SimpleNamespace

import pytest
from chat_models import TEXT_END, TURN_END, TURN_START, answer, build_chat_tokenizer, question
from datasets import Dataset
from transformers import GenerationConfig, GPT2Config

from minillm_trl.errors import UserError
from minillm_trl.training.ends_of_run import settle_ends, settle_tokenizer

CHATS = Dataset.from_list([{"prompt": question("a"), "completion": answer("b")}])
TEXTS = Dataset.from_dict({"prompt": ["a"]})


def settled(dataset, teacher=None, teacher_tokenizer=None, *, main: bool = True, vllm: dict | None = None, **options):
    tokenizer = build_chat_tokenizer(TEXT_END)
    tokenizer.chat_template = options.get("template", tokenizer.chat_template)
    declared = options.get("declared", tokenizer.eos_token_id)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        _student=SimpleNamespace(generation_config=GenerationConfig(eos_token_id=declared), config=GPT2Config()),
        train_dataset=dataset,
        args=SimpleNamespace(eos_tokens=options.get("eos_tokens")),
        chat_template_kwargs=options.get("chat_template_kwargs"),
        accelerator=SimpleNamespace(is_main_process=main),
        use_vllm=vllm is not None,
        vllm_generation=SimpleNamespace(generation_kwargs=vllm),
        generation_config=GenerationConfig(),
        generation_kwargs={"top_k": 5},
    )
    settle_ends(trainer, teacher, teacher_tokenizer)
    return trainer, tokenizer.convert_tokens_to_ids(TEXT_END), tokenizer.convert_tokens_to_ids(TURN_END)


@pytest.mark.parametrize(("dataset", "ends"), [(CHATS, (True, True)), (None, (True, True)), (TEXTS, (True, False))])
def test_conversations_end_with_the_turn_too_and_an_environment_brings_conversations(dataset, ends: tuple):
    trainer, text_end, turn_end = settled(dataset)
    expected = sorted(id_ for id_, is_end in zip((text_end, turn_end), ends, strict=True) if is_end)
    assert trainer.eos_token_ids == expected
    pad = trainer._tokenizer.pad_token_id
    assert (trainer.generation_config.eos_token_id, trainer.generation_config.pad_token_id) == (expected, pad)
    assert trainer.generation_kwargs == {"top_k": 5, "eos_token_id": expected, "pad_token_id": pad}
    student = trainer._student.generation_config.eos_token_id
    assert sorted([student] if isinstance(student, int) else student) == expected


def test_tokens_of_the_user_and_of_the_teacher_count():
    trainer, _, turn_end = settled(TEXTS, eos_tokens=[TURN_END])
    assert trainer.eos_token_ids == [turn_end]
    both = sorted(settled(CHATS)[1:])
    tokenizer = build_chat_tokenizer(TEXT_END)
    for teacher, teacher_tokenizer in (
        (GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END)), None),
        (None, SimpleNamespace(eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END))),
    ):
        assert settled(TEXTS, teacher, teacher_tokenizer)[0].eos_token_ids == both


def test_ends_that_the_student_declares_count():
    _, text_end, turn_end = settled(TEXTS)
    for declared in (turn_end, [turn_end], [text_end, turn_end]):
        assert settled(TEXTS, declared=declared)[0].eos_token_ids == sorted([text_end, turn_end])


@pytest.mark.parametrize("closes", [False, True])
def test_turns_end_as_the_arguments_of_the_template_say(closes: bool):
    end = f"{{{{ '{TURN_END}' if closes else '{TEXT_END}' }}}}"
    template = f"{{% for m in messages %}}{TURN_START}{{{{ m.role }}}} {{{{ m.content }}}}{end}{{% endfor %}}"
    trainer, text_end, turn_end = settled(CHATS, template=template, chat_template_kwargs={"closes": closes})
    assert trainer.eos_token_ids == sorted([text_end, turn_end][: 1 + closes])


@pytest.mark.parametrize("given", [{}, {"ignore_eos": False, "top_k": 3}])
def test_vllm_has_the_ends_unless_the_user_sets_its_options(given: dict):
    trainer, text_end, _ = settled(TEXTS, vllm=given)
    found = trainer.vllm_generation.generation_kwargs
    assert found == {"stop_token_ids": [text_end], "ignore_eos": True, **given}
    assert trainer.generation_kwargs == {"top_k": 5}
    assert trainer.generation_config.eos_token_id is None


@pytest.mark.parametrize("main", [True, False])
def test_main_process_announces_them(monkeypatch, main: bool):
    announced = []
    monkeypatch.setattr(
        "minillm_trl.models.end_tokens.EndTokens.announce", lambda ends, of: announced.append(ends.ids)
    )
    trainer, *_ = settled(TEXTS, main=main)
    assert announced == ([trainer.eos_token_ids] if main else [])


@pytest.mark.parametrize("keep", [False, True])
def test_tokenizer_has_the_end_of_conversations_unless_the_user_chose_its_eos(keep: bool):
    tokenizer = build_chat_tokenizer(TEXT_END)
    ends = settle_tokenizer(tokenizer, *([keep] if keep else []), conversational=True)
    assert tokenizer.eos_token == (TEXT_END if keep else TURN_END)
    assert set(ends.ids) == set(tokenizer.convert_tokens_to_ids([TEXT_END, TURN_END]))


def test_tokenizer_that_appends_its_eos_stops_that(caplog):
    tokenizer = build_chat_tokenizer(TURN_END)
    plain = tokenizer("a")["input_ids"]
    tokenizer.bos_token = TURN_START
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    settle_tokenizer(tokenizer, conversational=False)
    assert tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *plain]
    assert f"appended {TURN_END!r} to every text" in caplog.text
    caplog.clear()
    settle_tokenizer(tokenizer, conversational=False)
    assert "appended" not in caplog.text


def test_tokenizer_without_an_end_is_refused():
    tokenizer = build_chat_tokenizer(None, template=None)
    with pytest.raises(UserError, match="has no eos_token"):
        settle_tokenizer(tokenizer, conversational=False)
