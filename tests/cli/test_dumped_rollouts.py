"""The metrics of docs/metrics.md, recomputed from a dumped rollout and the checkpoints beside it.

Nothing of the package's mathematics is used: plain transformers, one response at a time, loops over its tokens.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
import yaml
from conftest import PPO
from torch import Tensor

TEMPERATURE = 0.8
ALIKE = {"rel": 2e-4, "abs": 2e-5}
NEW_TOKENS, ROWS = 6, 8


def uneven(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward that differs from response to response."""
    return [len(set(response)) / 3 - 0.1 * len(response) for response in responses]


def write(place: Path, name: str, **model: Any) -> None:
    """Two rollouts of eight responses, two passes of a single minibatch each: every step sees its whole rollout."""
    settings = {
        "base": {"name": "tiny"},
        "reward": {"class_path": "RewardFromFunction", "init_args": {"function": "test_dumped_rollouts.uneven"}},
        "sampling": {"max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE},
        "learning_rate": 3e-2,
        **model,
    }
    data = {"rollout_size": 4, "samples_per_prompt": 2, "batch_size": 8, "ppo_epochs": 2, "micro_batch_tokens": 64}
    config = {
        "name": name,
        "model": {"class_path": name.upper(), "init_args": settings},
        "data": {**PPO["data"], "init_args": {**PPO["data"]["init_args"], **data}},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False},
        "checkpoint": {"every_n_train_steps": 1, "keep_all": True},
        "debug": {"dump_rollouts": True},
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))


class Run:
    """A finished run: its rollouts, its steps, and the models before each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.steps = [{key: float(value) for key, value in row.items() if value} for row in rows if row["train/loss"]]
        paths = sorted((folder / "rollouts").iterdir())
        self.rollouts = [torch.load(path, weights_only=True) for path in paths]
        assert [path.name for path in paths] == ["000000.pt", "000001.pt"]

    def weights(self, step: int, prefix: str) -> dict[str, Tensor]:
        """What the parts named by a prefix were before a step, in float64; none before the first."""
        if step == 0:
            return {}
        path = self.folder / "checkpoints" / f"step_{step:07d}.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        return {name.removeprefix(prefix): w.double() for name, w in state.items() if name.startswith(prefix)}

    def policy(self, step: int) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("tiny").double()
        model.load_state_dict(self.weights(step, "roles.models.policy.") or model.state_dict())
        return model

    def values(self, step: int, rows: list[Row]) -> list[list[float]]:
        """The critic's value of each state; its head before the first step is drawn at random, so step 0 has none."""
        from transformers import AutoModel

        body = AutoModel.from_pretrained("tiny").double()
        weights = self.weights(step, "roles.models.value.model.")
        body.load_state_dict(weights)
        head = self.weights(step, "roles.heads.value.")
        found = []
        for row in rows:
            with torch.no_grad():
                states = body(row.tokens[None]).last_hidden_state[0]
            found.append([float(states[t - 1] @ head["weight"][0] + head["bias"][0]) for t in row.actions])
        return found


class Row:
    """One response of a dumped rollout."""

    def __init__(self, rollout: dict[str, Any], i: int) -> None:
        length = int(rollout["lengths"][i])
        self.tokens = rollout["tokens"][i, :length]
        self.actions = [t for t in range(length) if rollout["mask"][i, t]]
        assert self.actions == list(range(self.actions[0], length)), "the response is the end of the sequence"
        self.number = i
        self.rollout = rollout

    def column(self, name: str) -> list[float]:
        """A per-token column of the dump, over the response."""
        return [float(self.rollout[name][self.number, t]) for t in self.actions]

    def table(self, model: Any) -> Tensor:
        """[actions, vocabulary] log-probs of a model at this row's actions."""
        logits = model(self.tokens[None]).logits[0]
        return torch.stack([(logits[t - 1] / TEMPERATURE).log_softmax(-1) for t in self.actions])

    def logprobs(self, model: Any) -> list[Tensor]:
        return [row[self.tokens[t]] for row, t in zip(self.table(model), self.actions, strict=True)]


def rows_of(rollout: dict[str, Any]) -> list[Row]:
    assert len(rollout["lengths"]) == ROWS
    return [Row(rollout, i) for i in range(ROWS)]


def flat(lists: list[list[float]]) -> list[float]:
    return [x for row in lists for x in row]


def steps_of(run: Run) -> Iterator[tuple[int, dict[str, float], dict[str, Any]]]:
    """Number, metrics, and the rollout of each step."""
    assert len(run.steps) == 4
    for number, metrics in enumerate(run.steps):
        yield number, metrics, run.rollouts[number // 2]


def check_rollout(run: Run, number: int, beta: float, kl_of: Any) -> None:
    """What is logged of a rollout, from its tokens, the policy at its time and the reference."""
    rollout, metrics = run.rollouts[number], run.steps[2 * number]
    rows = rows_of(rollout)
    policy, reference = run.policy(2 * number), run.policy(0)
    kl, exact, entropies, penalties, gaps = [], [], [], [], []
    with torch.no_grad():
        for row in rows:
            table, base = row.table(policy), row.table(reference)
            own, other = ([float(x) for x in row.logprobs(m)] for m in (policy, reference))
            assert row.column("policy_logprobs") == pytest.approx(own, **ALIKE)
            assert row.column("reference_logprobs") == pytest.approx(other, **ALIKE)
            ratios = [a - b for a, b in zip(own, other, strict=True)]
            kl.append(sum(ratios))
            exact.append(float((table.exp() * (table - base)).sum()))
            entropies += [float(-(line.exp() * line).sum()) for line in table]
            penalties.append(sum(beta * kl_of(ratio) for ratio in ratios))
            gaps += [abs(a - b) for a, b in zip(row.column("sampled_logprobs"), own, strict=True)]
    scores, shaped = rollout["scores"].tolist(), rollout["shaped_scores"].tolist()
    assert scores == pytest.approx(uneven([], rollout["responses"], []), abs=1e-6)
    expected = {
        "objective/kl": fmean(kl),
        "objective/kl_exact": fmean(exact),
        "objective/entropy": fmean(entropies),
        "objective/scores": fmean(scores),
        "objective/shaped_scores": fmean(shaped),
        "objective/non_score_reward": -fmean(penalties),
        "objective/rlhf_reward": fmean(shaped) - fmean(penalties),
        "objective/kl_coef": rollout["kl_coef"],
        "rollout/length": fmean(len(row.actions) for row in rows),
        "rollout/eos_rate": fmean(int(row.tokens[-1]) == 1 for row in rows),
        "rollout/sampler_gap": max(gaps),
    }
    for name, value in expected.items():
        for step in run.steps[2 * number : 2 * number + 2]:
            assert step[name] == pytest.approx(value, **ALIKE), name
    assert metrics["objective/kl_coef"] == pytest.approx(rollout["kl_coef"])


def check_policy(step: dict[str, float], rows: list[Row], new: list[list[float]], loss_of: Any) -> None:
    """What is logged of the policy's update, from the log-probs before the step."""
    old = [row.column("policy_logprobs") for row in rows]
    moves = [a - b for a, b in zip(flat(new), flat(old), strict=True)]
    ratios = [math.exp(move) for move in moves]
    assert step["policy/approxkl"] == pytest.approx(fmean(move**2 / 2 for move in moves), **ALIKE)
    assert step["policy/update_kl"] == pytest.approx(-fmean(moves), **ALIKE)
    assert step["policy/ratio_mean"] == pytest.approx(fmean(ratios), **ALIKE)
    assert step["policy/ratio_var"] == pytest.approx(pstdev(ratios) ** 2, **ALIKE)
    advantages = flat([row.column("advantages") for row in rows])
    losses = [loss_of(ratio, advantage) for ratio, advantage in zip(ratios, advantages, strict=True)]
    free = [-ratio * advantage for ratio, advantage in zip(ratios, advantages, strict=True)]
    clipped = [abs(a - b) > 1e-9 for a, b in zip(losses, free, strict=True)]
    assert step["policy/clipfrac"] == pytest.approx(fmean(clipped), abs=1e-6)


def test_ppo(run, place) -> None:
    shaping = {"normalise": "standardise", "clip": 1.5, "missing_eos": {"rule": "subtract", "value": 0.5}}
    write(
        place, "ppo", critic={"init": "policy"}, shaping=shaping,
        kl={"class_path": "AdaptiveKL", "init_args": {"beta": 0.2, "target": 0.01, "horizon": 100}},
        policy_loss={"clip_low": 0.1, "dual_clip": 1.5, "entropy_coefficient": 0.01},
        value_loss={"clip": 0.05, "coefficient": 0.3}, advantages={"gamma": 0.97, "lam": 0.9},
    )  # fmt: skip
    answer = run("fit", "--config", "ppo.yaml")
    assert answer.status == 0, answer.err
    done = Run(place / "runs" / "ppo" / "version_0")
    beta, seen = 0.2, []
    for number, rollout in enumerate(done.rollouts):
        assert rollout["kl_coef"] == pytest.approx(beta)
        seen += rollout["scores"].tolist()
        for i, score in enumerate(rollout["scores"].tolist()):
            standard = max(-1.5, min(1.5, (score - fmean(seen)) / pstdev(seen)))
            expected = standard - (0 if rollout["ended"][i] else 0.5)
            assert float(rollout["shaped_scores"][i]) == pytest.approx(expected, **ALIKE)
        check_rollout(done, number, beta, lambda ratio: ratio)
        check_experience(rollout, beta)
        error = max(-0.2, min(0.2, done.steps[2 * number]["objective/kl"] / 0.01 - 1))
        beta *= 1 + error * ROWS / 100

    def loss_of(ratio: float, advantage: float) -> float:
        loss = max(-advantage * ratio, -advantage * max(0.9, min(1.1, ratio)))
        return min(loss, -1.5 * advantage) if advantage < 0 else loss

    moved = 0.0
    for number, step, rollout in steps_of(done):
        rows, model = rows_of(rollout), done.policy(number)
        with torch.no_grad():
            tables = [row.table(model) for row in rows]
            new = [[float(x) for x in row.logprobs(model)] for row in rows]
        check_policy(step, rows, new, loss_of)
        old = flat([row.column("policy_logprobs") for row in rows])
        ratios = [math.exp(a - b) for a, b in zip(flat(new), old, strict=True)]
        losses = [loss_of(r, a) for r, a in zip(ratios, flat([row.column("advantages") for row in rows]), strict=True)]
        entropy = fmean(float(-(line.exp() * line).sum()) for table in tables for line in table)
        assert step["policy/loss"] == pytest.approx(fmean(losses), **ALIKE)
        assert step["policy/entropy"] == pytest.approx(entropy, **ALIKE)
        old_values, returns = (flat([row.column(name) for row in rows]) for name in ("values", "returns"))
        values = flat(done.values(number, rows)) if number else old_values
        near = [v0 + max(-0.05, min(0.05, v - v0)) for v, v0 in zip(values, old_values, strict=True)]
        pairs = list(zip(values, near, returns, strict=True))
        value_loss = fmean(max((v - r) ** 2, (n - r) ** 2) / 2 for v, n, r in pairs)
        assert step["value/loss"] == pytest.approx(value_loss, **ALIKE)
        clipped = fmean((n - r) ** 2 > (v - r) ** 2 for v, n, r in pairs)
        assert step["value/clipfrac"] == pytest.approx(clipped, abs=1e-6)
        residual = [r - v for r, v in zip(returns, old_values, strict=True)]
        explained = 1 - pstdev(residual) ** 2 / pstdev(returns) ** 2
        assert step["value/explained_variance"] == pytest.approx(explained, rel=1e-3, abs=1e-3)
        total = fmean(losses) - 0.01 * entropy + 0.3 * value_loss
        assert step["train/loss"] == pytest.approx(total, **ALIKE)
        assert step["train/learning_rate"] == pytest.approx(3e-2 * (1 - number / 4))
        moved = max(moved, step["policy/clipfrac"] * step["value/clipfrac"])
    assert moved > 0, "both clips were at work"


def check_experience(rollout: dict[str, Any], beta: float) -> None:
    """Rewards, returns and whitened advantages, by the definition: A_t = Σ_k (γλ)^k δ_{t+k}."""
    raw: list[float] = []
    for row in rows_of(rollout):
        own, other, values = (row.column(name) for name in ("policy_logprobs", "reference_logprobs", "values"))
        rewards = [-beta * (a - b) for a, b in zip(own, other, strict=True)]
        rewards[-1] += float(rollout["shaped_scores"][row.number])
        assert row.column("rewards") == pytest.approx(rewards, **ALIKE)
        count = len(rewards)
        delta = [rewards[t] + 0.97 * (values[t + 1] if t + 1 < count else 0.0) - values[t] for t in range(count)]
        advantages = [sum((0.97 * 0.9) ** (k - t) * delta[k] for k in range(t, count)) for t in range(count)]
        expected = [a + v for a, v in zip(advantages, values, strict=True)]
        assert row.column("returns") == pytest.approx(expected, **ALIKE)
        raw += advantages
    whitened = flat([row.column("advantages") for row in rows_of(rollout)])
    mean, deviation = fmean(raw), math.sqrt(pstdev(raw) ** 2 + 1e-8)
    assert whitened == pytest.approx([(a - mean) / deviation for a in raw], rel=1e-3, abs=1e-3)


def test_grpo(run, place) -> None:
    write(
        place, "grpo",
        kl={"class_path": "FixedKL", "init_args": {"beta": 0.5, "estimator": "k3", "placement": "loss"}},
        policy_loss={"clip_low": 0.1, "aggregation": "sequence_mean", "importance_cap": 1.5},
    )  # fmt: skip
    answer = run("fit", "--config", "grpo.yaml")
    assert answer.status == 0, answer.err
    done = Run(place / "runs" / "grpo" / "version_0")
    for number, rollout in enumerate(done.rollouts):
        check_rollout(done, number, 0.0, lambda ratio: 0.0)
        scores, zero = rollout["scores"].tolist(), 0
        for i in range(0, ROWS, 2):  # two responses to each prompt
            mean = (scores[i] + scores[i + 1]) / 2
            deviation = abs(scores[i] - scores[i + 1]) / math.sqrt(2)
            zero += 2 * (scores[i] == scores[i + 1])
            for j in (i, i + 1):
                row = Row(rollout, j)
                expected = (scores[j] - mean) / (deviation + 1e-4)
                assert row.column("advantages") == pytest.approx([expected] * len(row.actions), **ALIKE)
        assert done.steps[2 * number]["rollout/zero_advantages"] == pytest.approx(zero / ROWS)
    for number, step, rollout in steps_of(done):
        rows, model = rows_of(rollout), done.policy(number)
        live = [row.logprobs(model) for row in rows]
        new = [[float(x.detach()) for x in logprobs] for logprobs in live]

        def loss_of(ratio: float, advantage: float) -> float:
            return max(-advantage * ratio, -advantage * max(0.9, min(1.1, ratio)))

        check_policy(step, rows, new, loss_of)
        loss, kl, weights = 0.0, 0.0, []
        for row, logprobs in zip(rows, new, strict=True):
            columns = (
                row.column(n) for n in ("policy_logprobs", "sampled_logprobs", "reference_logprobs", "advantages")
            )
            for now, old, drawn, base, advantage in zip(logprobs, *columns, strict=True):
                weights.append(min(math.exp(old - drawn), 1.5))
                loss += weights[-1] * loss_of(math.exp(now - old), advantage) / len(logprobs) / ROWS
                kl += (math.exp(base - now) - 1 - (base - now)) / len(logprobs) / ROWS
        assert step["policy/loss"] == pytest.approx(loss, **ALIKE)
        assert step["policy/grad_norm"] == pytest.approx(gradient_norm(model, rows, live), rel=1e-3)
        assert step["policy/kl_loss"] == pytest.approx(kl, **ALIKE)
        assert step["policy/importance"] == pytest.approx(fmean(weights), **ALIKE)
        assert step["train/loss"] == pytest.approx(loss + 0.5 * kl, **ALIKE)
    assert done.steps[-1]["policy/kl_loss"] > 1e-3


def gradient_norm(model: Any, rows: list[Row], live: list[list[Tensor]]) -> float:
    """The L2 norm of the gradient of the same loss, by autograd through the plain model."""
    loss = torch.zeros((), dtype=torch.float64)
    for row, logprobs in zip(rows, live, strict=True):
        columns = (
            row.column(name) for name in ("policy_logprobs", "sampled_logprobs", "reference_logprobs", "advantages")
        )
        for now, old, drawn, base, advantage in zip(logprobs, *columns, strict=True):
            ratio = (now - old).exp()
            policy = min(math.exp(old - drawn), 1.5) * torch.max(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1))
            loss = loss + (policy + 0.5 * ((base - now).exp() - 1 - (base - now))) / len(logprobs) / ROWS
    loss.backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def test_an_algorithm_without_rollouts_refuses(run, place) -> None:
    answer = run("fit", "--config", "sft.yaml", "--debug.dump_rollouts=true")
    assert answer.status == 2
    assert "debug.dump_rollouts: SFT makes no rollouts" in answer.err
