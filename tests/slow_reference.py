"""A second, slow implementation of MiniLLM's optimizer step: full log-softmax, loops over rows and tokens, no padding.

It imports nothing from the package. It follows the paper, `docs/method.md`, and the table of importance weights in
`docs/configuration.md`. All values are float64, in nats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# Every option that the loss and the scores of a rollout depend on, at its default.
DEFAULTS = {
    "teacher_mixed_alpha": 0.2,
    "temperature": 1.0,
    "kd_temperature": None,
    "gamma": 1.0,
    "include_current_reward": None,
    "length_normalization": True,
    "discounted_length": True,
    "reward_scale": 1.0,
    "reward_clip": None,
    "reward_estimator": "sampled",
    "advantage_baseline": "none",
    "whiten_advantages": "none",
    "rkl_advantage": True,
    "single_step_decomposition": True,
    "single_step_divergence": "reverse_kl",
    "forward_kl_share": 0.5,
    "jsd_beta": 0.5,
    "skew_alpha": 0.1,
    "teacher_entropy_threshold": 0.8,
    "importance_weighting": "token",
    "importance_weight_cap": None,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "iw_opd_gamma": 0.0,
    "top_entropy_quantile": 1.0,
    "loss_reduction": "token_mean",
    "lm_coef": 1.0,
    "lm_kd_ratio": 0.0,
    "lm_max_length": 512,
    "num_generations": 1,
    "reward_weights": None,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "max_completion_length": 512,
}


@dataclass(frozen=True)
class Row:
    """A prompt and its completion. `trained` is False on tokens that a tool or an environment wrote."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    trained: tuple[bool, ...]
    behavior_logps: tuple[float, ...] | None = None  # if the rollout came with them

    @property
    def positions(self) -> list[int]:
        return [t for t, counts in enumerate(self.trained) if counts]


# The logits `(T, V)` that predict the completion of each row
Logits = Mapping[Row, torch.Tensor]


@dataclass
class Constants:
    """Values of a rollout that are constant in its optimizer steps, by position in the completion."""

    old: dict[int, float] = field(default_factory=dict)  # log q_old
    behavior: dict[int, float] = field(default_factory=dict)  # log mu
    reference: dict[int, float] = field(default_factory=dict)
    advantage: dict[int, float] = field(default_factory=dict)
    long_weight: dict[int, float] = field(default_factory=dict)
    single_weight: dict[int, float] = field(default_factory=dict)
    token_weight: dict[int, float] = field(default_factory=dict)
    entropy: dict[int, float] = field(default_factory=dict)


def next_token_logits(model: torch.nn.Module, rows: Sequence[Row]) -> dict[Row, torch.Tensor]:
    """Return the logits of one unpadded forward pass for each row."""
    logits = {}
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        logits[row] = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
    return logits


class SlowMiniLLM:
    """MiniLLM under one setting of its options.

    Args:
        options: values that differ from the default; options without influence on the loss are ignored.
        vocab_size: leading rows of the vocabulary that student and teacher share.
        reward_funcs: functions of a completion's tokens.
    """

    def __init__(
        self,
        options: Mapping[str, object],
        vocab_size: int,
        reward_funcs: Sequence[Callable[[Sequence[int]], float]] = (),
    ):
        o = self.options = {name: options.get(name, default) for name, default in DEFAULTS.items()}
        if o["include_current_reward"] is None:
            o["include_current_reward"] = not o["single_step_decomposition"]
        high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
        self.range = 1 - o["epsilon"], 1 + high
        self.most = math.inf if o["delta"] is None else o["delta"]
        self.vocab_size = vocab_size
        self.reward_funcs = reward_funcs

    def log_probs(self, logits: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        logits = logits[:, : self.vocab_size].double() / (temperature or self.options["temperature"])
        return torch.log_softmax(logits, dim=-1)

    def kd_log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        return self.log_probs(logits, self.options["kd_temperature"])

    # Constants of a rollout

    def constants(
        self, rows: Sequence[Row], student: Logits, teacher: Logits, reference: Logits | None = None
    ) -> dict[Row, Constants]:
        """Score a whole buffer: `rows` of all processes and of all optimizer steps of a pass."""
        found = {}
        for row in set(rows):
            constants = found[row] = Constants()
            q, p = self.log_probs(student[row]), self.log_probs(teacher[row])
            q_kd, p_kd = self.kd_log_probs(student[row]), self.kd_log_probs(teacher[row])
            reference_logps = None if reference is None else self.log_probs(reference[row])
            rewards, expected = {}, {}
            for t in row.positions:
                token = row.completion[t]
                constants.old[t] = q[t, token].item()
                constants.entropy[t] = -(q[t].exp() * q[t]).sum().item()
                constants.behavior[t] = self._behavior(row, t, p[t, token].item(), q[t, token].item())
                if reference_logps is not None:
                    constants.reference[t] = reference_logps[t, token].item()
                rewards[t] = self._reward(p_kd[t, token].item() - q_kd[t, token].item())
                if self.options["reward_estimator"] == "expected":
                    each = zip(q[t].exp().tolist(), (p_kd[t] - q_kd[t]).tolist(), strict=True)
                    expected[t] = sum(prob * self._reward(log_ratio) for prob, log_ratio in each)
            future = expected or rewards
            constants.advantage = {t: self._return({**future, t: rewards[t]}, t) for t in row.positions}
            self._weigh(row, constants)
            constants.token_weight = self._discrepancy_weights(rewards)
        self._select_tokens(rows, found)
        if self.options["rkl_advantage"] and self.options["advantage_baseline"] != "none":
            self._subtract_baseline(rows, found)
        if self.options["rkl_advantage"] and self.options["whiten_advantages"] != "none":
            self._whiten(rows, found)
        advantages = dict(zip(rows, self._reward_advantages(rows), strict=True))
        for row, constants in found.items():
            constants.advantage = {t: value + advantages[row] for t, value in constants.advantage.items()}
        return found

    def _behavior(self, row: Row, t: int, log_p: float, log_q: float) -> float:
        if row.behavior_logps is not None:
            return row.behavior_logps[t]
        alpha = self.options["teacher_mixed_alpha"]
        return math.log(alpha * math.exp(log_p) + (1 - alpha) * math.exp(log_q))

    def _reward(self, log_ratio: float) -> float:
        reward = log_ratio / self.options["reward_scale"]
        clip = self.options["reward_clip"]
        return reward if clip is None else max(-clip, min(clip, reward))

    def _return(self, rewards: Mapping[int, float], t: int) -> float:
        if not self.options["rkl_advantage"]:
            return 0.0
        first = t if self.options["include_current_reward"] else t + 1
        total = length = 0.0
        for i, reward in rewards.items():
            if i >= first:
                weight = self.options["gamma"] ** (i - first)
                total += weight * reward
                length += weight if self.options["discounted_length"] else 1.0
        return total / length if self.options["length_normalization"] and length > 0 else total

    def _discrepancy_weights(self, rewards: Mapping[int, float]) -> dict[int, float]:
        """Return 1 + gamma (1 - share of the discrepancy that lies before the token)."""
        total, before, weights = sum(map(abs, rewards.values())), 0.0, {}
        for t, reward in rewards.items():
            weights[t] = 1 + self.options["iw_opd_gamma"] * (1 - before / total)
            before += abs(reward)
        return weights

    def _select_tokens(self, rows: Sequence[Row], found: Mapping[Row, Constants]) -> None:
        """Weigh the tokens of highest entropy in the buffer by N / k, and the others by 0."""
        entropies = sorted((value for row in rows for value in found[row].entropy.values()), reverse=True)
        kept = math.ceil(self.options["top_entropy_quantile"] * len(entropies))
        for constants in found.values():
            for t, value in constants.entropy.items():
                constants.token_weight[t] *= len(entropies) / kept if value >= entropies[kept - 1] else 0.0

    def _subtract_baseline(self, rows: Sequence[Row], found: Mapping[Row, Constants]) -> None:
        """Subtract the mean return of other rows (of the same prompt, if asked) that have a token at the position."""
        returns = [dict(found[row].advantage) for row in rows]
        for i, row in enumerate(rows):
            of_prompt = self.options["advantage_baseline"] == "group"
            others = [
                returns[j] for j, other in enumerate(rows) if j != i and (not of_prompt or other.prompt == row.prompt)
            ]
            for t, value in returns[i].items():
                alive = [other[t] for other in others if t in other]
                found[row].advantage[t] = value - (sum(alive) / len(alive) if alive else 0.0)

    def _whiten(self, rows: Sequence[Row], found: Mapping[Row, Constants]) -> None:
        values = [value for row in rows for value in found[row].advantage.values()]
        if self.options["whiten_advantages"] == "padding":  # a slot for every token that a completion might have had
            values += [0.0] * (len(rows) * self.options["max_completion_length"] - len(values))
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        for constants in found.values():
            for t, value in constants.advantage.items():
                constants.advantage[t] = (value - mean) / math.sqrt(variance + 1e-8)

    def _weigh(self, row: Row, constants: Constants) -> None:
        ratio = {t: math.exp(constants.old[t] - constants.behavior[t]) for t in row.positions}
        cap = self.options["importance_weight_cap"] or math.inf
        whole, before = math.prod(ratio.values()), 1.0
        for t in row.positions:
            through = before * ratio[t]
            long_weight, single_weight = {
                "token": (1.0, 1.0),
                "decoupled": (ratio[t], 1.0),
                "prefix": (through, before),
                "sequence": (whole, whole),
            }[self.options["importance_weighting"]]
            constants.long_weight[t], constants.single_weight[t] = min(long_weight, cap), min(single_weight, cap)
            before = through

    def _reward_advantages(self, rows: Sequence[Row]) -> list[float]:
        """Return GRPO's advantages within a prompt, or within the whole buffer if prompts have one completion."""
        if not self.reward_funcs:
            return [0.0] * len(rows)
        weights = self.options["reward_weights"] or [1.0] * len(self.reward_funcs)
        scores = [[function(row.completion) for function in self.reward_funcs] for row in rows]
        grouped = self.options["num_generations"] > 1
        groups = [[j for j, other in enumerate(rows) if not grouped or other.prompt == row.prompt] for row in rows]
        if self.options["multi_objective_aggregation"] == "normalize_then_sum":
            columns = list(zip(*scores, strict=True))
            totals = [
                sum(
                    weight * _normalized(column[i], [column[j] for j in groups[i]])
                    for weight, column in zip(weights, columns, strict=True)
                )
                for i in range(len(rows))
            ]
            return [_normalized(total, totals) for total in totals]
        totals = [sum(w * score for w, score in zip(weights, row, strict=True)) for row in scores]
        advantages = []
        for total, members in zip(totals, groups, strict=True):
            group = [totals[j] for j in members]
            centered = total - sum(group) / len(group)
            spread = {"none": None, "group": group, "batch": totals}[self.options["scale_rewards"]]
            advantages.append(centered if spread is None else centered / (_deviation(spread) + 1e-4))
        return advantages

    # The loss of an optimizer step

    def loss(
        self, rows: Sequence[Row], student: Logits, teacher: Logits, constants: Mapping[Row, Constants]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of an optimizer step on `rows`, without L_PT, and the metrics of docs/metrics.md."""
        by_row = [self._tokens(row, student[row], teacher[row], constants[row]) for row in rows]
        tokens = [token for row in by_row for token in row]
        kls = sorted(sum(token["objective/reverse_kl_per_token"].item() for token in row) for row in by_row)
        metrics = _metrics(tokens, len(rows))
        metrics |= {"objective/reverse_kl_median": kls[(len(kls) - 1) // 2], "objective/reverse_kl_max": kls[-1]}
        count = len(tokens) if self.options["loss_reduction"] == "token_mean" else len(rows)
        return sum(token["loss"] for token in tokens) / count, metrics

    def _tokens(self, row: Row, student: torch.Tensor, teacher: torch.Tensor, constants: Constants) -> list[dict]:
        q, q_kd, p_kd = self.log_probs(student), self.kd_log_probs(student), self.kd_log_probs(teacher)
        # The clipped ratio is to mu under "token"; elsewhere a weight has q_old / mu, and the ratio is to q_old
        base = constants.behavior if self.options["importance_weighting"] == "token" else constants.old
        tokens = []
        for t in row.positions:
            logp, advantage, weight = q[t, row.completion[t]], constants.advantage[t], constants.long_weight[t]
            ratio = (logp - base[t]).exp()
            single_step = self._divergence(q_kd[t].exp(), p_kd[t].exp(), row.completion[t])
            long_term = weight * self._clipped(ratio, advantage)
            by_mixing = self._is_clipped(math.exp(constants.old[t] - base[t]), advantage)
            token = {
                "objective/long_term": long_term,
                "objective/single_step": single_step,
                "objective/reverse_kl_per_token": _kl(q_kd[t].exp(), p_kd[t].exp()),
                "objective/advantage": advantage,
                "entropy": -(q[t].exp() * q[t]).sum(),
                "clip_ratio/mixing": by_mixing,
                "clip_ratio/drift": self._is_clipped(ratio.item(), advantage) and not by_mixing,
                "importance_weight/mean": weight * ratio,
                "loss": long_term,
            }
            if self.options["single_step_decomposition"]:
                token["loss"] = token["loss"] + constants.single_weight[t] * single_step
            token["loss"] = constants.token_weight[t] * token["loss"]
            if self.options["beta"] > 0:
                difference = constants.reference[t] - logp
                token["kl"] = difference.exp() - difference - 1
                corrected = token["kl"] * (weight * ratio if self.options["use_bias_correction_kl"] else 1.0)
                token["loss"] = token["loss"] + self.options["beta"] * corrected
            tokens.append(token)
        return tokens

    def _divergence(self, q: torch.Tensor, p: torch.Tensor, token: int) -> torch.Tensor:
        """Return the single step at a token, from the probabilities of the next one."""
        o = self.options
        beta, share, alpha = o["jsd_beta"], o["forward_kl_share"], o["skew_alpha"]
        trust = min(1.0, (p[token] / q[token]).item())
        unsure = -(p * p.log()).sum() > o["teacher_entropy_threshold"]
        return {
            "reverse_kl": lambda: _kl(q, p),
            "mixed_kl": lambda: share * _kl(p, q) + (1 - share) * _kl(q, p),
            "generalized_jsd": lambda: (
                beta * _kl(p, beta * p + (1 - beta) * q) + (1 - beta) * _kl(q, beta * p + (1 - beta) * q)
            ),
            "skewed_forward_kl": lambda: _kl(p, alpha * p + (1 - alpha) * q),
            "entropy_aware_kl": lambda: _kl(q, p) + unsure * _kl(p, q),
            "trust_region_kl": lambda: trust * _kl(q, p) + (1 - trust) * _kl(p, q),
        }[o["single_step_divergence"]]()

    def _clipped(self, ratio: torch.Tensor, advantage: float) -> torch.Tensor:
        low, high = self.range
        terms = ratio.clamp(max=self.most) * advantage, ratio.clamp(low, high) * advantage
        return -min(terms, key=lambda term: term.item())

    def _is_clipped(self, ratio: float, advantage: float) -> bool:
        low, high = self.range
        if advantage > 0:
            return ratio > high
        return advantage < 0 and (ratio < low or ratio > self.most)

    def corpus_loss(
        self, rows: Sequence[Row], student: Logits, teacher: Logits
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return `lm_coef` * L_PT over the sequences of an optimizer step, at temperature 1."""
        cross_entropy, forward_kl = [], []
        for row in rows:
            q, p = self.log_probs(student[row], 1.0), self.log_probs(teacher[row], 1.0)
            for t in row.positions:
                if len(row.prompt) + t < self.options["lm_max_length"]:
                    cross_entropy.append(-q[t, row.completion[t]])
                    forward_kl.append((p[t].exp() * (p[t] - q[t])).sum())
        entropy, kl = sum(cross_entropy) / len(cross_entropy), sum(forward_kl) / len(forward_kl)
        share = self.options["lm_kd_ratio"]
        metrics = {"objective/lm_cross_entropy": entropy.item()}
        if share > 0:
            metrics["objective/lm_forward_kl"] = kl.item()
        return self.options["lm_coef"] * ((1 - share) * entropy + share * kl), metrics


def _kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum()


def _metrics(tokens: Sequence[Mapping], num_rows: int) -> dict[str, float]:
    names = tokens[0].keys() - {"loss"}
    tokens = [{name: float(torch.as_tensor(token[name]).detach()) for name in names} for token in tokens]
    metrics = {name: sum(token[name] for token in tokens) / len(tokens) for name in names}
    metrics["objective/reverse_kl"] = metrics["objective/reverse_kl_per_token"] * len(tokens) / num_rows
    weights = [token["importance_weight/mean"] for token in tokens]
    metrics["importance_weight/max"] = max(weights)
    squares = sum(weight**2 for weight in weights)
    metrics["importance_weight/effective_sample_size"] = sum(weights) ** 2 / (len(weights) * squares)
    return metrics


def _deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _normalized(value: float, group: Sequence[float]) -> float:
    return (value - sum(group) / len(group)) / (_deviation(group) + 1e-4)
