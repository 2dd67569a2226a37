"""Algorithms against the optimum that can be written down (``world.py``); the policy is a table (``table.py``)."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from table import number, save_table
from torch import Tensor, nn
from world import (
    BANDIT,
    BETA,
    EVERYTHING,
    LETTERS,
    PROMPT_TOKENS,
    PROMPTS,
    SEQUENCES,
    STOP,
    VOCABULARY,
    World,
    distance,
    make_ppo,
    train,
)

from rlhf_lit.algorithms import DPO, PPO, RewardModel
from rlhf_lit.batches import PreferenceBatch, Sequences
from rlhf_lit.losses import advantages as advantages_file
from rlhf_lit.losses import kl as kl_file
from rlhf_lit.losses.advantages import GAE, generalised_advantages
from rlhf_lit.losses.kl import Estimator, FixedKL, KLController, estimate_kl
from rlhf_lit.losses.preference import DPOLoss, IPOLoss, PairLogProbs, PreferenceLoss, RobustDPOLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Critic
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout import collect as collect_file
from rlhf_lit.rollout.record import RolloutRecord
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardFromModel

CLOSE, FAR = 0.02, 0.1  # total variation to the optimum: reached, and certainly not
EXACT = 1e-6  # the same where the gradient is
Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """π₀, a random table of logits."""
    return Base(name=save_table(tmp_path_factory.mktemp("table"), LETTERS, seed=0))


def test_the_world_is_complete_and_the_optimum_is_elsewhere(base: Base) -> None:
    module = tiny.build(DPO(base, DPOLoss(beta=BETA))).double()
    for world in (SEQUENCES, BANDIT):
        reference = world.table(module, "reference")
        torch.testing.assert_close(reference.exp().sum(-1), torch.ones(len(PROMPTS), dtype=torch.float64))
        assert distance(reference, world.optimum(reference)) > 4 * FAR


# --- preferences: exact gradients over all pairs ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """All pairs of different responses to a prompt.

    Attributes:
        first, second: [pairs] their places in a flattened table of prompts and responses.
        preferred: [pairs] P(first ≻ second), by Bradley and Terry.
    """

    first: Tensor
    second: Tensor
    preferred: Tensor

    @classmethod
    def of(cls, world: World) -> "Pairs":
        size = len(world.responses)
        start = size * torch.arange(len(PROMPTS))[:, None]
        first, second = ((start + side).flatten() for side in torch.triu_indices(size, size, offset=1))
        rewards = world.rewards.flatten()
        return cls(first, second, torch.sigmoid(rewards[first] - rewards[second]))

    def batch(self, sequences: Sequences) -> PreferenceBatch:
        """Their tokens, the first response of each as the chosen one."""
        sides = sequences.select(self.first), sequences.select(self.second)
        return PreferenceBatch(*sides, torch.zeros(len(self.first)), EVERYTHING)

    def flipped(self, rate: float) -> "Pairs":
        """The same pairs, so many of their labels turned round."""
        return replace(self, preferred=(1 - rate) * self.preferred + rate * (1 - self.preferred))


@dataclass(frozen=True)
class Expected(PreferenceLoss):
    """The mean of a loss over the labels that a pair may get, times the pair's own weight.

    Attributes:
        loss: of a labelled pair.
        preferred, weight: [pairs].
    """

    loss: PreferenceLoss
    preferred: Tensor
    weight: Tensor

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        turned = PairLogProbs(
            pairs.policy_rejected,
            pairs.policy_chosen,
            pairs.reference_rejected,
            pairs.reference_chosen,
            pairs.rejected_tokens,
            pairs.chosen_tokens,
        )
        return self.weight * (self.preferred * self.loss(pairs) + (1 - self.preferred) * self.loss(turned))


def minimise(module: DPO | RewardModel, batch: PreferenceBatch) -> None:
    """The module's own loss of a batch, by LBFGS to convergence."""
    denominators = module.denominators(batch)
    optimizer = torch.optim.LBFGS(
        module.trainable_parameters(),
        max_iter=200,
        max_eval=250,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        (share,) = module.losses(batch, denominators)
        share.loss.backward()
        return share.loss.detach()

    optimizer.step(closure)  # type: ignore[arg-type]


def prefer(base: Base, loss: PreferenceLoss, pairs: Pairs, weight: Tensor) -> DPO:
    """DPO at π₀, before exact preferences."""
    return tiny.build(DPO(base, Expected(loss.beta, loss, pairs.preferred, weight))).double()


def fit(module: DPO, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Fit it to them. → tables of its log-probs, and of π₀'s before the fit."""
    reference = SEQUENCES.table(module, "reference")
    minimise(module, pairs.batch(SEQUENCES.sequences))
    return SEQUENCES.table(module), reference


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs.of(SEQUENCES)


@pytest.fixture(scope="module")
def evenly(pairs: Pairs) -> Tensor:
    """All pairs alike."""
    return torch.ones_like(pairs.preferred)


@pytest.fixture(scope="module")
def by_dpo(base: Base, pairs: Pairs, evenly: Tensor) -> tuple[Tensor, Tensor]:
    """What DPO makes of the preferences, and π₀."""
    return fit(prefer(base, DPOLoss(beta=BETA), pairs, evenly), pairs)


def test_dpo_reaches_the_optimum(by_dpo: tuple[Tensor, Tensor]) -> None:
    policy, reference = by_dpo
    assert distance(policy, SEQUENCES.optimum(reference)) < EXACT


def test_dpo_with_a_gradient_through_its_reference_does_not(
    base: Base, pairs: Pairs, evenly: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The margins come out right, but half of each is π₀'s doing."""
    module = prefer(base, DPOLoss(beta=BETA), pairs, evenly)
    reference = SEQUENCES.table(module, "reference")
    module.roles.models["reference"].requires_grad_(True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "no_grad", nullcontext)
        minimise(module, pairs.batch(SEQUENCES.sequences))
    assert distance(SEQUENCES.table(module), SEQUENCES.optimum(reference)) > FAR


def test_robust_dpo_on_flipped_labels_reaches_the_optimum_and_cdpo_does_not(
    base: Base, pairs: Pairs, evenly: Tensor
) -> None:
    robust, conservative = (
        fit(prefer(base, kind(beta=BETA, label_smoothing=0.2), pairs.flipped(0.2), evenly), pairs)
        for kind in (RobustDPOLoss, DPOLoss)
    )
    assert distance(robust[0], SEQUENCES.optimum(robust[1])) < EXACT
    assert distance(conservative[0], SEQUENCES.optimum(conservative[1])) > FAR


def test_ipo_reaches_its_own_optimum(base: Base, pairs: Pairs) -> None:
    """π₀·exp(E_{y′~π₀} P(y ≻ y′)/β), y′ = y counted at ½ (2310.12036, Theorem 1 and Eq. 17; log-probs summed).

    Its pairs are two draws from π₀.
    """
    start = SEQUENCES.table(tiny.build(DPO(base, DPOLoss(beta=BETA))).double())
    drawn = (start.flatten()[pairs.first] + start.flatten()[pairs.second]).exp()
    policy, reference = fit(prefer(base, IPOLoss(beta=BETA), pairs, drawn), pairs)
    preferred = torch.sigmoid(SEQUENCES.rewards[:, :, None] - SEQUENCES.rewards[:, None])
    wins = (preferred * reference.exp()[:, None]).sum(-1)
    assert distance(policy, SEQUENCES.optimum(reference, wins)) < EXACT
    assert distance(policy, SEQUENCES.optimum(reference)) > FAR


@pytest.fixture(scope="module")
def reward_model(base: Base, pairs: Pairs) -> RewardModel:
    """Fitted to the exact preferences."""
    module = tiny.build(RewardModel(base)).double()
    labelled = module.loss

    def expected(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        won, lost = labelled(chosen, rejected, margin), labelled(rejected, chosen, margin)
        return pairs.preferred * won + (1 - pairs.preferred) * lost

    module.loss = expected  # type: ignore[assignment]
    minimise(module, pairs.batch(SEQUENCES.sequences))
    return module


def test_the_reward_model_recovers_the_reward(reward_model: RewardModel) -> None:
    """Up to a constant of each prompt."""
    with torch.no_grad():
        error = reward_model.scores(SEQUENCES.sequences).view(len(PROMPTS), -1) - SEQUENCES.rewards
    assert float((error - error.mean(-1, keepdim=True)).abs().max()) < EXACT


# --- PPO: sampled, through the trainer and the data module -----------------------------------------------------------


def run(base: Base, folder: Path, rollouts: int, world: World = SEQUENCES, **settings: Any) -> tuple[Tensor, Tensor]:
    """PPO from π₀. → tables of the log-probs it ends with, and of π₀'s."""
    module = make_ppo(base, world, **settings)
    train(module, folder, rollouts)
    return world.table(module), world.table(module, "reference")


def flip_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_file, "estimate_kl", lambda logratio, estimator: -estimate_kl(logratio, estimator))


def penalise_by_the_full_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for every token that could have been drawn, and tells them nothing."""

    monkeypatch.setattr(KLController, "in_reward", lambda self, comparison: comparison.exact_kl)


def score_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of the second then never learns what it was worth."""

    def rewards(scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
        placed = torch.where(mask, -penalty, 0.0)
        placed[torch.arange(len(mask)), mask.int().argmax(-1)] += scores
        return placed

    monkeypatch.setattr(collect_file, "token_rewards", rewards)


def forget_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages over padding too: what the critic says of a response that has ended is taken for a future."""

    def values(model: nn.Module, head: nn.Module, sequences: Sequences) -> Tensor:
        return token_values(model, head, replace(sequences, mask=torch.ones_like(sequences.mask)))

    def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, ...]:
        found = generalised_advantages(rewards, values, torch.ones_like(mask), gamma, lam)
        return tuple(torch.where(mask, column, 0.0) for column in found)

    monkeypatch.setattr(collect_file, "token_values", values)
    monkeypatch.setattr(advantages_file, "generalised_advantages", advantages)


def test_ppo_reaches_the_optimum(base: Base, tmp_path: Path) -> None:
    policy, reference = run(base, tmp_path, 40)
    assert distance(policy, SEQUENCES.optimum(reference)) < CLOSE


@pytest.fixture
def learned(reward_model: RewardModel, tmp_path: Path) -> dict[str, Any]:
    """The reward model, saved, as reward and critic; advantages of one step, where a critic's faults show most."""
    save_hf(reward_model, tmp_path / "reward")
    return {
        "reward": RewardFromModel(str(tmp_path / "reward")),
        "critic": Critic(init="reward"),
        "advantages": GAE(lam=0.0),
    }


def test_reward_model_and_ppo_arrive_where_dpo_does(
    base: Base, learned: dict[str, Any], by_dpo: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    policy, _ = run(base, tmp_path, 30, **learned)
    assert distance(policy, by_dpo[0]) < CLOSE


@pytest.mark.parametrize("fault", [flip_the_penalty, penalise_by_the_full_kl, score_the_first_token])
def test_ppo_with_a_fault_does_not(base: Base, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    policy, reference = run(base, tmp_path, 8)
    assert distance(policy, SEQUENCES.optimum(reference)) > 2 * FAR


def test_ppo_without_masked_advantages_does_not(
    base: Base, learned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_the_mask(monkeypatch)
    policy, reference = run(base, tmp_path, 10, **learned)
    assert distance(policy, SEQUENCES.optimum(reference)) > FAR


# --- the KL in the loss ----------------------------------------------------------------------------------------------


def run_with_the_kl_in_the_loss(
    base: Base,
    folder: Path,
    rollouts: int,
    estimator: Estimator,
    world: World = BANDIT,
    learning_rate: float = 0.03,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages as they are: whitened, they would stand in another unit than β."""
    kl = FixedKL(BETA, estimator, "loss")
    settings = {"advantages": GAE(whiten=whiten), "learning_rate": learning_rate}
    return run(base, folder, rollouts, world, kl=kl, **settings)


def test_whitened_advantages_move_the_optimum_of_the_kl_in_the_loss(base: Base, tmp_path: Path) -> None:
    """They are divided by their standard deviation, and β is not."""
    policy, reference = run_with_the_kl_in_the_loss(base, tmp_path, 25, "k2", whiten=True)
    assert distance(policy, BANDIT.optimum(reference)) > 0.2


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_k2_and_the_full_kl_as_loss_reach_the_optimum_of_one_token(
    base: Base, estimator: Estimator, tmp_path: Path
) -> None:
    policy, reference = run_with_the_kl_in_the_loss(base, tmp_path, 25, estimator)
    assert distance(policy, BANDIT.optimum(reference)) < CLOSE


def test_k3_as_loss_reaches_another(base: Base, tmp_path: Path) -> None:
    """Its gradient is that of KL(π₀‖π): βπ₀/π + r is one constant of the prompt, and the probabilities sum to 1."""
    policy, reference = run_with_the_kl_in_the_loss(base, tmp_path, 25, "k3")
    assert distance(policy, BANDIT.optimum(reference)) > 3 * CLOSE
    low, high = (BANDIT.rewards.amax(-1, keepdim=True) + gap for gap in (1e-9, BETA))
    for _ in range(60):
        constant = (low + high) / 2
        too_much = (BETA * reference.exp() / (constant - BANDIT.rewards)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, constant, low), torch.where(too_much, high, constant)
    assert distance(policy, (BETA * reference.exp() / (high - BANDIT.rewards)).log()) < CLOSE


def test_k2_as_loss_with_a_gradient_through_the_reference_does_not(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference on the policy's own graph: its gradient takes away what the policy's gives, and no penalty acts."""

    def cancelled(logratio: Tensor, estimator: Estimator) -> Tensor:
        return estimate_kl(logratio.detach(), estimator)

    monkeypatch.setattr(kl_file, "estimate_kl", cancelled)
    policy, reference = run_with_the_kl_in_the_loss(base, tmp_path, 8, "k2", learning_rate=0.1)
    assert distance(policy, BANDIT.optimum(reference)) > 2 * FAR


def test_the_kl_in_the_loss_does_not_see_what_a_token_leads_to(base: Base, tmp_path: Path) -> None:
    """On sequences k2 as loss penalises each token alone. The last token has the right distribution, and a token before
    it is worth the mean reward of what follows, not the reward less the penalty."""
    world = World(SEQUENCES.responses, SEQUENCES.rewards / 2)
    policy, reference = run_with_the_kl_in_the_loss(base, tmp_path, 30, "k2", world)
    firsts = torch.tensor([response[0] for response in world.responses])
    tilted = reference + world.rewards / BETA
    following = tilted - world.first_tokens(tilted)[:, firsts]  # log π*(second | first), 0 after EOS
    worth = torch.zeros(len(PROMPTS), VOCABULARY, dtype=following.dtype)
    worth.index_add_(1, firsts, following.exp() * world.rewards)
    first = (world.first_tokens(reference) + worth / BETA).log_softmax(-1)
    assert distance(policy, first[:, firsts] + following) < 2 * CLOSE
    assert distance(policy, world.optimum(reference)) > FAR


# --- what the optimum is like ----------------------------------------------------------------------------------------


@pytest.fixture
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def at_the_optimum(base: Base, in_float64: None, monkeypatch: pytest.MonkeyPatch) -> PPO:
    """PPO whose policy is π*, whose critic knows every value, and whose rollout is every trajectory, once.

    A critic's word about a response that has ended means nothing, and is nonsense here.
    """
    module = make_ppo(base, SEQUENCES, advantages=GAE(whiten=False)).double()
    reference = SEQUENCES.table(module, "reference")
    SEQUENCES.write_policy(module, SEQUENCES.optimum(reference))
    values = module.roles.heads["value"]
    values.bias.data.zero_()
    values.weight.data.fill_(7.0)
    start, tilted = (SEQUENCES.first_tokens(x) for x in (reference, reference + SEQUENCES.rewards / BETA))
    for i, prompt in enumerate(PROMPT_TOKENS):
        values.weight.data[0, number([prompt], VOCABULARY)] = BETA * tilted[i].logsumexp(-1)
        for token in range(STOP):
            values.weight.data[0, number([prompt, token], VOCABULARY)] = BETA * (tilted - start)[i, token]
    _, samples = SEQUENCES.everything()
    with torch.no_grad():  # as of a sampler that draws from the policy
        samples = replace(samples, sampled_logprobs=token_logprobs(module.roles.policy, samples.sequences))
    monkeypatch.setattr(module, "respond", lambda prompts, stream: samples)
    return module


def experience(module: PPO) -> RolloutRecord:
    """The module's own rollout of every trajectory."""
    records: list[RolloutRecord] = []
    module.on_rollout = lambda rollout, record: records.append(record)
    module.rollout(SEQUENCES.everything()[0], 0)
    return records[0]


def policy_gradient(module: PPO, record: RolloutRecord) -> float:
    """The largest entry of the policy's gradient, the trajectories as likely as they are."""
    module.zero_grad()
    weights = row_sums(record.comparison.policy, record.samples.sequences.mask).exp()
    for row, weight in enumerate(weights):
        batch = record.experience.select(torch.tensor([row]))
        policy, _ = module.losses(batch, {name: torch.tensor(1.0) for name in ("tokens", "episodes")})
        (weight * policy.loss).backward()
    return float(module.roles.policy.lm_head.weight.grad.abs().max())


def test_at_the_optimum_every_trajectory_is_worth_the_same_and_nothing_moves(at_the_optimum: PPO) -> None:
    record = experience(at_the_optimum)
    mask, reference = record.samples.sequences.mask, SEQUENCES.table(at_the_optimum, "reference")
    worth = (record.scores.shaped.double() - row_sums(record.penalty, mask)).view(len(PROMPTS), -1)
    best = BETA * (reference + SEQUENCES.rewards / BETA).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(worth, best.expand_as(worth), rtol=0, atol=1e-10)
    torch.testing.assert_close(row_sums(record.rewards, mask).view_as(worth), worth, rtol=0, atol=1e-10)
    assert float(record.experience.advantages.abs().max()) < 1e-10
    torch.testing.assert_close(record.experience.returns, record.experience.values, rtol=0, atol=1e-10)
    assert policy_gradient(at_the_optimum, record) < 1e-10


@pytest.mark.parametrize("fault", [flip_the_penalty, penalise_by_the_full_kl, score_the_first_token, forget_the_mask])
def test_every_fault_moves_the_optimum(at_the_optimum: PPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    assert policy_gradient(at_the_optimum, experience(at_the_optimum)) > 1e-3


# --- limits ----------------------------------------------------------------------------------------------------------


def constant(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward that prefers nothing."""
    return [1.0] * len(responses)


@pytest.mark.parametrize(
    "settings",
    [{"kl": FixedKL(50.0)}, {"reward": RewardFromFunction(constant)}],
    ids=["large beta", "constant reward"],
)
def test_a_displaced_policy_returns_to_the_reference(base: Base, settings: dict[str, Any], tmp_path: Path) -> None:
    module = make_ppo(base, SEQUENCES, **settings)
    reference = SEQUENCES.table(module, "reference")
    SEQUENCES.write_policy(module, SEQUENCES.optimum(reference, beta=4 * BETA))
    assert kl_to(SEQUENCES.table(module), reference) > 0.1
    train(module, tmp_path, 20)
    assert kl_to(SEQUENCES.table(module), reference) < 1e-3
    assert distance(SEQUENCES.table(module), reference) < CLOSE


def kl_to(policy: Tensor, reference: Tensor) -> float:
    """Σ π·log(π/π₀), the largest over the prompts."""
    return float((policy.exp() * (policy - reference)).sum(-1).max())


def test_under_a_constant_reward_the_reference_stays_where_it_is(base: Base, tmp_path: Path) -> None:
    """A critic that knows the constant leaves no advantage, not even rounding."""
    module = make_ppo(base, SEQUENCES, reward=RewardFromFunction(constant))
    values = module.roles.heads["value"]
    values.weight.data.zero_()
    values.bias.data.fill_(1.0)
    before = module.roles.policy.lm_head.weight.clone()
    train(module, tmp_path, 2)
    assert module.roles.policy.lm_head.weight.equal(before)
    assert (values.weight == 0).all()


def test_reward_and_beta_in_another_unit_have_the_same_optimum(base: Base, tmp_path: Path) -> None:
    def quadruple(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [4 * score for score in SEQUENCES.score(prompts, responses, rows)]

    policy, reference = run(base, tmp_path, 30, reward=RewardFromFunction(quadruple), kl=FixedKL(4 * BETA))
    assert distance(policy, SEQUENCES.optimum(reference)) < CLOSE


@pytest.mark.parametrize(("n", "expected"), [(4, 0.63629), (16, 1.83509)])
def test_kl_of_best_of_n(n: int, expected: float) -> None:
    """log n − (n − 1)/n where no two rewards are equal: the k-th of N equally likely responses is the best of n draws
    with probability (k/N)ⁿ − ((k − 1)/N)ⁿ."""
    count = 1_000_000
    below = torch.arange(count + 1, dtype=torch.float64) / count
    best = below.pow(n).diff()
    exact = float((best * (best * count).log().nan_to_num(neginf=0)).sum())
    assert exact == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-5)
    assert exact == pytest.approx(expected, abs=1e-5)
