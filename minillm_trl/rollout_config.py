"""Define `RolloutConfig`: the fields that say how rollouts are computed, see docs/memory_and_speed.md."""

from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class RolloutConfig(GRPOConfig):
    r"""Say how rollouts are sampled: what rows share, and what is copied, merged, compiled or overlapped.

    Args:
        sampling_batch_size (`int`, *optional*):
            Rows decoded together on a process; all rows of a rollout by default.
        shared_coins (`bool`, *optional*, defaults to `True`):
            Whether rows decoded together share the coins of teacher-mixed sampling, so that only one of the models
            runs at a step. Each row follows the mixture in both cases. `False` makes rows independent of each other
            and of the number of processes, and runs both models at most steps.
        mixing (`str`, *optional*, defaults to `"coins"`):
            How rollouts are sampled from the mixture. `"coins"`: a coin before each token decides which model draws
            it. `"speculative"`: the student drafts blocks of tokens, and one pass of the teacher over a block corrects
            it, see [`rollouts.speculative`]. Rows are then independent of each other and of the number of processes,
            as with `shared_coins=False`, but take fewer calls of the teacher. `"auto"`: a short measurement at the
            first rollout decides. The decision is logged, and checkpoints store it. With `use_vllm`, vLLM drafts,
            see [`rollouts.engine_drafts`], and `"auto"` is `"speculative"`.
        half_precision_rollouts (`bool`, *optional*):
            Whether to sample rollouts from a copy of the student in the half precision of `fp16` or `bf16`, which is
            updated before each rollout. Used by default on CUDA devices with mixed precision, where every decoding
            step would otherwise cast the float32 weights again. The ratio to the behavior policy uses the log-probs of
            this copy.
        merged_rollouts (`bool`, *optional*):
            Whether rollouts are sampled from a copy of the student with its adapters merged into the weights, see
            `models.merged_adapters`. By default they are, where the weights are not quantised.
        compile_rollouts (`str`, *optional*):
            Backend of `torch.compile` for decoding steps, with a static KV cache: `"inductor"`, `"cudagraphs"` on
            devices without Triton, or `"auto"`: the former on GPUs from compute capability 8.0 on, the latter on older
            ones (V100), nothing on a CPU. A step is one graph: body and head of the student or of a teacher in full
            weights that stays on its device, the draw and the end test. Each shape (rows, length rounded up to a power
            of two; 1, 4 or 16 tokens at once) is compiled once. Layers with a sliding window cache all positions. By
            default, nothing is compiled.
        overlap_rollouts (`bool`, *optional*, defaults to `False`):
            Whether to sample the next rollout while the student trains on the current one, in another thread, from a
            copy of the student. Rollouts after the first are then one buffer stale: they are sampled by the student
            from before the updates on the previous buffer. Rewards and importance weights use the log-probs of this
            copy, so the ratio accounts for its distance from the trained student. See
            [`~minillm_trl.training.overlapped_rollouts.OverlappedRollouts`].
        rollout_device (`str`, *optional*):
            Device on which rollouts are sampled with `overlap_rollouts`, such as `"cuda:1"`; by default the one that
            trains. The copy of the student and a teacher in this process are there, also for the first rollout and for
            evaluations. The device that trains keeps the teacher's head. Process i of a machine takes this index plus
            i: two that train on `cuda:0` and `cuda:1` need `"cuda:2"`, and sample on `cuda:2` and `cuda:3`. A process
            without a launcher trains on its first GPU alone. Checkpoints do not depend on the device. Refused for a
            quantised student, a split teacher and `teacher_shares_base`.
    """

    sampling_batch_size: int | None = field(
        default=None, metadata={"help": "Rows decoded together on a process; by default all rows of a rollout."}
    )
    shared_coins: bool = field(
        default=True,
        metadata={"help": "Share coins among rows decoded together: fewer forward passes, but dependent rows."},
    )
    mixing: str = field(
        default="coins",
        metadata={
            "help": "How to sample from the mixture: a coin before each token, or drafts of the student that the "
            "teacher corrects; auto measures both.",
            "choices": ["coins", "speculative", "auto"],
        },
    )
    half_precision_rollouts: bool | None = field(
        default=None,
        metadata={"help": "Sample from a half-precision copy of the student; by default on GPUs in fp16 or bf16."},
    )
    merged_rollouts: bool | None = field(
        default=None,
        metadata={"help": "Sample with the adapters merged; by default where the weights are not quantised."},
    )
    compile_rollouts: str | None = field(
        default=None,
        metadata={
            "help": "Compile decoding steps, with a static KV cache, by this backend of torch.compile.",
            "choices": ["inductor", "cudagraphs", "auto"],
        },
    )
    overlap_rollouts: bool = field(
        default=False,
        metadata={"help": "Sample the next rollout during the updates, from a copy that is one buffer older."},
    )
    rollout_device: str | None = field(
        default=None,
        metadata={"help": "Device that samples with overlap_rollouts, such as cuda:1; process i takes its index + i."},
    )
