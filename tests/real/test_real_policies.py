"""A real instruction-tuned model learns from its own answers: PPO, RLOO and GRPO, resumed and evaluated."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from real_model import BASE, CPU, LORA, MODEL, Place, Run, gibibytes, needs_model, place
from run_folders import assert_equal, final, timeless

pytestmark = needs_model
__all__ = ["place"]  # a fixture

PAIRS = ("--data.train.path=pairs.jsonl", "--data.batch_size=8", "--trainer.max_steps=2")
KL = ("--model.kl=FixedKL", "--model.kl.beta=0.05")
SAMPLED = ("--model.sampling.max_new_tokens=24", "--model.sampling.temperature=0.7", "--debug.dump_rollouts=true")
PROMPTS = ("--data.train.path=answers.jsonl", "--data.rollout_size=8")
# Two rollouts of two minibatches each.
FOUR_STEPS = ("--data.batch_size=4", "--data.ppo_epochs=1", "--trainer.max_steps=4")


class TerminatedAfterThree(Callback):
    """SIGTERM, as from a scheduler, in the middle of the second rollout's minibatches."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def reward(place: Place) -> Run:
    """Whole weights: a critic of its own may start from it."""
    return place.fit("reward", "RewardModel", "PreferenceDataModule", BASE, *PAIRS, "--model.learning_rate=2e-5")


@pytest.fixture(scope="module")
def adapter_reward(place: Place) -> Run:
    """An adapter on the base that the policy stands on too."""
    return place.fit("judge", "RewardModel", "PreferenceDataModule", *LORA, *PAIRS, "--model.learning_rate=1e-3")


def scored_by(name: str) -> tuple[str, ...]:
    return ("--model.reward=RewardFromModel", f"--model.reward.path=runs/{name}")


@pytest.fixture(scope="module")
def ppo(place: Place, reward: Run) -> Run:
    """Four models: policy, reference, reward model, and a critic that starts from the latter."""
    rate = ("--model.learning_rate=2e-6", "--model.critic.init=reward")
    steps = ("--data.batch_size=8", "--data.ppo_epochs=1", "--trainer.max_steps=2")
    return place.fit(
        "ppo", "PPO", "RolloutDataModule", BASE, *scored_by("reward"), *KL, *SAMPLED, *PROMPTS, *rate, *steps
    )


def one_base(*more: str) -> tuple[str, ...]:
    """All roles as adapters on one base."""
    rate = ("--model.learning_rate=1e-4", "--model.critic.init=reward")
    return (*LORA, *scored_by("judge"), *KL, *SAMPLED, *PROMPTS, *rate, *FOUR_STEPS, *more)


@pytest.fixture(scope="module")
def ppo_on_one_base(place: Place, adapter_reward: Run) -> Run:
    return place.fit("one_base", "PPO", "RolloutDataModule", *one_base())


@pytest.fixture(scope="module")
def rloo(place: Place, adapter_reward: Run) -> Run:
    twice = ("--data.rollout_size=4", "--data.samples_per_prompt=2", "--data.batch_size=8", "--data.ppo_epochs=1")
    learn = ("--model.learning_rate=1e-3", "--trainer.max_steps=2")
    train = ("--data.train.path=answers.jsonl",)
    return place.fit(
        "rloo", "RLOO", "RolloutDataModule", *LORA, *scored_by("judge"), *KL, *SAMPLED, *train, *twice, *learn
    )


@pytest.fixture(scope="module")
def grpo(place: Place) -> Run:
    """Answers without commas, told by IFEval's own check."""
    data = ("--data.train.path=no_commas.jsonl", "--data.rollout_size=4", "--data.samples_per_prompt=4")
    learn = ("--data.batch_size=16", "--data.ppo_epochs=1", "--trainer.max_steps=2", "--model.learning_rate=1e-3")
    loss = ("--model.reward=InstructionReward", *KL, "--model.kl.estimator=k3", "--model.kl.placement=loss")
    return place.fit("grpo", "GRPO", "RolloutDataModule", *LORA, *loss, *SAMPLED, *data, *learn)


ON_POLICY = ("ppo", "ppo_on_one_base", "rloo", "grpo")


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_run_starts_at_its_reference(name: str, request: pytest.FixtureRequest) -> None:
    """No KL, every ratio 1, and the sampler's log-probs those of the training forward; then the policy moves."""
    run: Run = request.getfixturevalue(name)
    first = run.steps[0]
    assert (first["objective/kl"], first["objective/kl_exact"]) == (0, 0)
    assert (first["policy/ratio_mean"], first["policy/clipfrac"]) == (1, 0)
    assert max(run.column("rollout/sampler_gap")) < 2e-4
    assert 0 < run.steps[-1]["objective/kl_exact"] < 5
    assert all(0.05 < entropy < math.log(49152) / 2 for entropy in run.column("objective/entropy"))


@pytest.mark.parametrize("name", ON_POLICY)
def test_what_was_sampled_is_english_and_stops(name: str, request: pytest.FixtureRequest) -> None:
    """Its log-probs are what plain transformers gives at this temperature, token by token."""
    from langdetect import DetectorFactory, detect_langs
    from transformers import AutoModelForCausalLM

    DetectorFactory.seed = 0
    run: Run = request.getfixturevalue(name)
    rollout = run.rollouts()[0]
    text = "\n".join(rollout["responses"])
    assert detect_langs(text)[0].lang == "en", text
    assert bool(rollout["ended"].any()), text
    assert "<|im" not in text
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for row in (0, 3):
        tokens, mask = rollout["tokens"][row, : int(rollout["lengths"][row])], rollout["mask"][row]
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1] / 0.7
        theirs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        kept = mask[1 : len(tokens)]
        ours = rollout["reference_logprobs"][row, 1 : len(tokens)]
        assert torch.allclose(ours[kept], theirs[kept], atol=2e-4)


def test_ppo_is_paid_by_the_reward_model(place: Place, reward: Run, ppo: Run) -> None:
    """Scores of whole answers by plain transformers, and the constant that the reward model was centred by."""
    from transformers import AutoModelForSequenceClassification

    judge = AutoModelForSequenceClassification.from_pretrained(reward.hf).eval()
    bias = json.loads((reward.hf / "reward.json").read_text())["bias"]
    for rollout in ppo.rollouts():
        for row in range(4):
            with torch.no_grad():
                tokens = rollout["tokens"][row, : int(rollout["lengths"][row])]
                theirs = float(judge(input_ids=tokens[None]).logits[0, 0]) + bias
            assert theirs == pytest.approx(float(rollout["scores"][row]), abs=2e-3)
    assert all(step["value/loss"] > 0 for step in ppo.steps)


def test_rloo_compares_two_answers_to_a_prompt(rloo: Run) -> None:
    """A₁ = R₁ − R₂ = −A₂, and before the first step R is the score alone."""
    rollout = rloo.rollouts()[0]
    scores, asked = rollout["scores"], rollout["prompt_index"]
    assert len(asked.unique()) * 2 == len(asked)
    for row, prompt in enumerate(asked.tolist()):
        (other,) = [i for i in range(len(asked)) if asked[i] == prompt and i != row]
        found = rollout["advantages"][row][rollout["mask"][row]]
        assert torch.allclose(found, (scores[row] - scores[other]).expand(len(found)), atol=1e-5)
    assert float(rollout["advantages"].abs().max()) > 0


def test_grpo_is_paid_for_answers_without_commas(grpo: Run) -> None:
    for rollout in grpo.rollouts():
        expected = [float(bool(text) and "," not in text) for text in rollout["responses"]]
        assert rollout["scores"].tolist() == expected
        assert 0 < sum(expected) < len(expected), "something to learn from"
    assert grpo.column("rollout/zero_advantages")[0] < 1
    assert grpo.column("policy/grad_norm")[0] > 0


def test_all_roles_cost_the_memory_of_one_model(place: Place, ppo_on_one_base: Run) -> None:
    """Policy, reference, reward model and critic: what is held beside the base are adapters and heads."""
    said = place.command(
        "memory", "--model=PPO", "--data=RolloutDataModule", *one_base()[:-1], "--data.max_length=64",
        "--trainer.accelerator=cpu", "--limit_gb=16",
    ).out  # fmt: skip
    gib = (MODEL / "model.safetensors").stat().st_size * 2 / 2**30  # its bfloat16 in float32
    assert gibibytes(said, "held: weights") == pytest.approx(gib, rel=0.01)
    assert gibibytes(said, "held: adapters and heads") < 0.06


def test_an_interrupted_run_ends_as_the_whole_one(place: Place, ppo_on_one_base: Run) -> None:
    """SIGTERM within a rollout's minibatches, then ``--ckpt_path=last``: to the bit."""
    callback = f"--trainer.callbacks={__name__}.TerminatedAfterThree"
    argv = ("fit", "--model=PPO", "--data=RolloutDataModule", *one_base())
    place.command(*argv, *CPU, "--name=resumed", callback, ends=143)
    folder = place.folder / "runs" / "resumed" / "version_0"
    assert final(folder)["global_step"] == 3
    place.command(*argv, *CPU, "--name=resumed", "--ckpt_path=last")
    ended, whole = final(folder), final(ppo_on_one_base.folder)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(ended[part], whole[part], part)
    resumed = Run(folder)
    assert [timeless(row) for row in resumed.steps] == [timeless(row) for row in ppo_on_one_base.steps]


def test_evaluate_compares_the_trained_policy_with_its_start(place: Place, adapter_reward: Run, rloo: Run) -> None:
    place.command(
        "evaluate", "runs/rloo", "--prompts.path=answers.jsonl", f"--baseline={MODEL}", f"--reference={MODEL}",
        "--judge=RewardFromModel", "--judge.path=runs/judge", "--samples=2", "--best_of=[1,2]",
        "--sampling.max_new_tokens=24", "--sampling.temperature=0.7", "--to=evaluated",
    )  # fmt: skip
    folder: Path = place.folder / "evaluated"
    found = json.loads((folder / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    scores = {who: [line[f"{who}/judge"] for line in lines] for who in ("model", "baseline")}
    assert len(lines) == 16
    for who, each in scores.items():
        told = found["responses"][who]
        assert told["scores"]["judge"]["mean"] == pytest.approx(fmean(each), abs=1e-6)
        assert told["scores"]["judge"]["low"] < fmean(each) < told["scores"]["judge"]["high"]
    assert found["win_rates"]["judge"]["win_rate"]["mean"] == pytest.approx(win_rate(lines))
    assert 0 < found["kl"]["exact"]["mean"] < 10, "the policy has moved"
    one, two = (best["proxy"]["mean"] for best in found["best_of_n"])
    best = {line["row"]: [x["model/judge"] for x in lines if x["row"] == line["row"]] for line in lines}
    assert one == pytest.approx(fmean(scores["model"]), abs=1e-6)
    assert two == pytest.approx(fmean(map(max, best.values())), abs=1e-6)
    assert all(line["model"] and line["baseline"] for line in lines)


def win_rate(lines: list[dict[str, Any]]) -> float:
    """Over prompts, the mean over all pairs of a sample of the model's and one of the baseline's."""
    rows = [[line for line in lines if line["row"] == row] for row in {line["row"] for line in lines}]
    pairs = [[(a["model/judge"], b["baseline/judge"]) for a in row for b in row] for row in rows]
    return fmean(fmean(float(a > b) + 0.5 * (a == b) for a, b in row) for row in pairs)
