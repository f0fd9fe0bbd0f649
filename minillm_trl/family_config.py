"""Define `FamilyConfig`: the fields of methods that change one line of MiniLLM, see docs/family.md."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from .divergences import DIVERGENCES, choose_divergence


@dataclass
class FamilyConfig(GRPOConfig):
    r"""Fields of MiniLLM's relatives: GKD, DistiLLM and later methods of on-policy distillation.

    Args:
        single_step_divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            The divergence of each next-token distribution in the single step, a function of `divergences`:
            `"reverse_kl"` (MiniLLM's), `"forward_kl"`, `"mixed_kl"`, `"generalized_jsd"` (GKD), `"skewed_forward_kl"`,
            `"skewed_reverse_kl"` (DistiLLM), `"entropy_aware_kl"` (EOPD), `"trust_region_kl"` (TrOPD). Only the
            reverse KL and the long term are terms of one gradient (Eq. 3). With another divergence, set
            `rkl_advantage=False` for the published method.
        forward_kl_share (`float`, *optional*, defaults to `0.5`):
            Weight of the forward KL in `"mixed_kl"`, in [0, 1]; the rest is reverse KL.
        jsd_beta (`float`, *optional*, defaults to `0.5`):
            GKD's beta in `"generalized_jsd"`, in [0, 1]: the teacher's share in the mixture. As in TRL, 0 is the
            forward KL and 1 the reverse KL.
        skew_alpha (`float`, *optional*, defaults to `0.1`):
            DistiLLM's alpha in `"skewed_forward_kl"` and `"skewed_reverse_kl"`, in [0, 1): how much of the first
            distribution is mixed into the second.
        teacher_entropy_threshold (`float`, *optional*, defaults to `0.8`):
            Entropy of the teacher, in nats, above which `"entropy_aware_kl"` adds the forward KL.
        top_entropy_quantile (`float`, *optional*, defaults to `1.0`):
            Share of the tokens of a rollout buffer to train, those of the student's highest entropy, in (0, 1], see
            [`positions.top_entropy_weights`]. Unlike in GRPO, the loss is the mean over these tokens, as in TIP.
        iw_opd_gamma (`float`, *optional*, defaults to `0.0`):
            IW-OPD's amplification of early tokens, see [`positions.prefix_discrepancy_weights`]. 0 weighs all tokens
            equally; the paper and TRL's trainer use 0.5.
        horizon_start (`int`, *optional*):
            Token limit of training rollouts at the start, see [`positions.rollout_horizon`]. By default always
            `max_completion_length`, which is also the limit in evaluation.
        horizon_steps (`int`, *optional*):
            Optimizer steps in which the limit grows to `max_completion_length`. By default it stays at
            `horizon_start`.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of the rows of a rollout whose completion is sampled, in [0, 1] (GKD's lambda, by TRL's name). The
            others train on the `completion` of their row of the dataset. These texts are not the student's, so no
            importance weight, return or estimate of the KL to the reference applies to them: a value below 1 requires
            `rkl_advantage=False`, `teacher_mixed_alpha=0.0` and `beta=0.0`. Metrics of completions then include these
            texts, and each model runs once more per rollout, to score them.
        skd_top_k (`int`, *optional*):
            SKD's K (arXiv 2410.11325): a token that the student samples outside the teacher's K likeliest tokens is
            replaced by a sample of the teacher, see `rollouts/teacher_replacement.py`. Importance weights and returns
            of such samples are not defined here, so it requires what `lmbda` below 1 requires. The authors use 25.
        offline_teacher (`str`, *optional*):
            Folder of `minillm-trl offline-teacher` with the teacher's scores of the dataset's completions, in place of
            `teacher_model` (Lightning OPD, arXiv 2604.13010). Requires `lmbda=0.0` and no evaluation during training,
            since only given completions have scores. As with `teacher_server_url`, the single step is a lower bound
            from the teacher's most likely tokens.
        cross_tokenizer (`bool`, *optional*, defaults to `False`):
            Whether the teacher may have another tokenizer. It then reads the texts of prompts and completions with its
            own tokenizer and chat template, and rewards are those of aligned spans of text, see `rollouts/spans.py`.
            Distributions over two vocabularies cannot be compared or mixed, so it requires
            `single_step_decomposition=False`, `teacher_mixed_alpha=0.0` and sampled rewards.
    """

    single_step_divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence of every next-token distribution in the single step (docs/family.md).",
            "choices": list(DIVERGENCES),
        },
    )
    forward_kl_share: float = field(
        default=0.5, metadata={"help": "Weight of the forward KL in `mixed_kl`, in [0, 1]; the rest is reverse KL."}
    )
    jsd_beta: float = field(default=0.5, metadata={"help": "GKD's beta in `generalized_jsd`, in [0, 1]."})
    skew_alpha: float = field(default=0.1, metadata={"help": "DistiLLM's alpha in the skewed divergences, in [0, 1)."})
    teacher_entropy_threshold: float = field(
        default=0.8,
        metadata={"help": "Teacher's entropy in nats above which `entropy_aware_kl` adds the forward KL."},
    )
    top_entropy_quantile: float = field(
        default=1.0, metadata={"help": "Train this share of a buffer's tokens, those of highest entropy, in (0, 1]."}
    )
    iw_opd_gamma: float = field(
        default=0.0, metadata={"help": "Amplify the loss of early tokens by up to this share (IW-OPD); 0: not at all."}
    )
    horizon_start: int | None = field(
        default=None, metadata={"help": "Token limit of training rollouts at the start; default: the whole limit."}
    )
    horizon_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps in which it grows to max_completion_length; default: never."}
    )
    lmbda: float = field(
        default=1.0,
        metadata={"help": "Share of rows whose completion is sampled; the others train on the dataset's (GKD)."},
    )
    skd_top_k: int | None = field(
        default=None,
        metadata={"help": "Replace sampled tokens outside the teacher's K likeliest by the teacher's samples (SKD)."},
    )

    offline_teacher: str | None = field(
        default=None,
        metadata={"help": "Folder with a teacher's stored scores (offline-teacher), instead of a teacher."},
    )
    cross_tokenizer: bool = field(
        default=False,
        metadata={"help": "The teacher has another tokenizer: rewards are those of aligned spans of text."},
    )

    def divergence(self) -> Callable[..., torch.Tensor]:
        """Return the divergence of the single step, with its parameter."""
        parameters = {name: getattr(self, name) for name in filter(None, DIVERGENCES.values())}
        return choose_divergence(self.single_step_divergence, **parameters)
