"""Define what the demo trains: sizes and learning rates for a few minutes on two CPU cores."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model with tied embeddings."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a run; the defaults are those of the full run. A run resumes only with the settings it started with.

    Attributes:
        seed: seed of initialisation, data order and rollouts.
        vocab_size: size of the tokenizer that is trained on the data.
        teacher, student: shapes of the two models.
        teacher_steps, student_steps: supervised updates of `sft_batch_size` examples.
        teacher_learning_rate, student_learning_rate: peak of a cosine schedule.
        minillm_steps: MiniLLM updates of `minillm_batch_size` rollouts, `num_iterations` passes over a buffer of
            `steps_per_generation` batches.
        eval_steps: updates between two evaluations on the validation prompts.
        max_completion_length: length limit in tokens.
        sampling_seeds: seeds of the final evaluation on the test prompts.
    """

    seed: int = 0
    vocab_size: int = 1024
    teacher: Shape = Shape(192, 3, 6)
    student: Shape = Shape(64, 1, 4)
    sft_batch_size: int = 32
    teacher_steps: int = 1200
    teacher_learning_rate: float = 2e-3
    student_steps: int = 1440
    student_learning_rate: float = 4e-3
    minillm_steps: int = 480
    minillm_batch_size: int = 32
    minillm_learning_rate: float = 1e-3
    steps_per_generation: int = 4
    num_iterations: int = 4
    eval_steps: int = 48
    max_completion_length: int = 80
    sampling_seeds: tuple[int, ...] = (10, 20, 30, 40, 50)

    def quick(self) -> "DemoSettings":
        """Return the settings of the short run: the same pipeline with a quarter of the training."""
        return replace(
            self, teacher_steps=280, student_steps=440, minillm_steps=96, eval_steps=16, sampling_seeds=(10, 20)
        )
