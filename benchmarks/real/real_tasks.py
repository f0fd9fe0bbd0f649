"""What the methods of the benchmark are trained and tested on: prompts, teacher and start."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Task:
    """Prompts, and the models that every method takes.

    Attributes:
        recipes: folders of the recipes whose stages run first.
        stages: the subcommands of these stages, by name.
        data: folder of the prepared prompts.
        teacher, start: stages that make the models.
        answers: stage that makes the teacher's answers to the training prompts.
        prompt_tokens: what rows with an answer have room for besides the answer.
        has_other_tests: whether the models are also tested on prompts of other kinds.
    """

    recipes: tuple[str, ...]
    stages: dict[str, str]
    data: str
    teacher: str
    start: str
    answers: str
    prompt_tokens: int
    has_other_tests: bool


_HEALING = {"teacher": "shrink", "dolly": "prepare-data", "start": "shrink", "answers": "seqkd", "heal": "kd"}

_CONTEXT = Task(
    recipes=("smollm2-92m", "smollm2-92m-context"),
    stages={
        **_HEALING,
        "context": "prepare-data",
        "context_teacher": "sft",
        "context_start": "sft",
        "context_answers": "seqkd",
    },
    data="smollm2_with_context",
    teacher="context_teacher",
    start="context_start",
    answers="context_answers",
    prompt_tokens=160,
    has_other_tests=False,
)

TASKS = {
    "short": Task(
        recipes=("smollm2-92m",),
        stages=_HEALING,
        data="smollm2_dolly",
        teacher="teacher",
        start="heal",
        answers="answers",
        prompt_tokens=128,
        has_other_tests=True,
    ),
    "context": _CONTEXT,
    # The same, from a student that was fine-tuned for twice as long
    "context_long": replace(_CONTEXT, stages={**_CONTEXT.stages, "context_sft": "sft"}, start="context_sft"),
}
