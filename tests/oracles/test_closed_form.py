"""Algorithms against the optimum that can be written down.

Three prompts, six tokens, responses of one or two tokens: 31 responses to each prompt, so that everything can be
enumerated. Every prompt begins with EOS, as it would after an earlier turn. The optimum is
π*(y|x) ∝ π₀(y|x)·exp(r(x, y)/β). The policy is a one-layer Llama in float64, wide enough to be any table.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import DPO, PPO, RewardModel
from rlhf_lit.algorithms import ppo as ppo_file
from rlhf_lit.algorithms.base import Optimizer
from rlhf_lit.algorithms.ppo import Critic
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.data.batching import RolloutLoader
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.policy_gradient import ClippedValueLoss
from rlhf_lit.losses.preference import DPOLoss, IPOLoss, PairLogProbs, PreferenceLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.loading import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Role
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction

BETA = 0.5
PROMPTS, VOCABULARY, STOP = 3, 6, 5
LETTERS = ["a", "b", "c", "d", "e", "<eos>"]
# An EOS at once, or another token and then any.
RESPONSES = [[STOP], *([first, second] for first in range(STOP) for second in range(VOCABULARY))]
TEXTS = [" ".join(LETTERS[token] for token in response if token != STOP) for response in RESPONSES]
REWARDS = torch.randn(PROMPTS, len(RESPONSES), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALL = Sequences.pad(
    [[STOP, prompt, *response] for prompt in range(PROMPTS) for response in RESPONSES],
    [[False, False, *(True for _ in response)] for _ in range(PROMPTS) for response in RESPONSES],
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A fresh one-layer Llama over six tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder: Path = tmp_path_factory.mktemp("table")
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, initializer_range=0.25, bos_token_id=None, eos_token_id=STOP, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    inner = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)
    return Base(name=str(folder))


def responses_logprobs(module: DPO | PPO, role: Role) -> Tensor:
    """[prompts, responses] log π(y|x)."""
    with module.roles.acting(role) as model:
        return row_sums(token_logprobs(model, ALL), ALL.mask).view(PROMPTS, -1)


def optimum(reference: Tensor, rewards: Tensor = REWARDS) -> Tensor:
    """[prompts, responses] log π*."""
    return (reference + rewards / BETA).log_softmax(-1)


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation between two tables of log-probs, the largest over the prompts."""
    return float((a.exp() - b.exp()).abs().sum(-1).max() / 2)


def test_the_world_is_complete_and_the_optimum_is_elsewhere(base: Base) -> None:
    module = tiny.build(DPO(base, DPOLoss(beta=BETA))).double()
    with torch.no_grad():
        reference = responses_logprobs(module, "reference")
    torch.testing.assert_close(reference.exp().sum(-1), torch.ones(PROMPTS, dtype=torch.float64))
    assert distance(reference, optimum(reference)) > 0.5
    # At π* every response has r − β·log(π*/π₀) = J*, the prompt's own constant.
    objective = REWARDS - BETA * (optimum(reference) - reference)
    expected = BETA * (reference + REWARDS / BETA).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(objective, expected.expand_as(objective))


def minimise(loss: Callable[[], Tensor], parameters: list[Any]) -> None:
    """Exact gradients to convergence."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, max_eval=250, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


FIRST, SECOND = (index.flatten() for index in torch.meshgrid(*[torch.arange(len(RESPONSES))] * 2, indexing="ij"))
PREFERRED = torch.sigmoid(REWARDS[:, FIRST] - REWARDS[:, SECOND])  # P(first ≻ second), Bradley–Terry


def fit_preferences(base: Base, loss: PreferenceLoss, weights: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A policy fitted to the exact preferences over all pairs; its table of log-probs and its reference's."""
    module = tiny.build(DPO(base, loss)).double()
    with torch.no_grad():
        reference = responses_logprobs(module, "reference")
    counts = ALL.mask.sum(-1).view(PROMPTS, -1)
    weight = weights(reference) * PREFERRED

    def objective() -> Tensor:
        policy = responses_logprobs(module, "policy")
        sides = [table[:, index].flatten() for table in (policy, reference, counts) for index in (FIRST, SECOND)]
        return (loss(PairLogProbs(*sides)) * weight.flatten()).sum()

    minimise(objective, module.trainable_parameters())
    with torch.no_grad():
        assert responses_logprobs(module, "reference").equal(reference)
        return responses_logprobs(module, "policy"), reference


def evenly(reference: Tensor) -> Tensor:
    """All pairs alike."""
    return torch.full_like(PREFERRED, 1 / FIRST.numel())


def by_reference(reference: Tensor) -> Tensor:
    """Pairs as two draws from π₀."""
    return (reference[:, FIRST] + reference[:, SECOND]).exp()


def test_dpo_reaches_the_optimum(base: Base) -> None:
    policy, reference = fit_preferences(base, DPOLoss(beta=BETA), evenly)
    assert distance(policy, optimum(reference)) < 1e-3


def test_cdpo_on_unflipped_preferences_does_not(base: Base) -> None:
    policy, reference = fit_preferences(base, DPOLoss(beta=BETA, label_smoothing=0.2), evenly)
    assert distance(policy, optimum(reference)) > 0.1


def test_ipo_reaches_its_own_optimum(base: Base) -> None:
    """π₀·exp(E_{y′~π₀} P(y ≻ y′)/β), y′ = y counted at ½ (2310.12036, Theorem 1 and Eq. 17; log-probs summed)."""
    policy, reference = fit_preferences(base, IPOLoss(beta=BETA), by_reference)
    wins = (PREFERRED.view(PROMPTS, len(RESPONSES), -1) * reference.exp()[:, None]).sum(-1)
    assert distance(policy, optimum(reference, wins)) < 1e-3
    assert distance(policy, optimum(reference)) > 0.1


def test_the_reward_model_recovers_the_reward(base: Base) -> None:
    """Up to a constant of each prompt."""
    module = tiny.build(RewardModel(base)).double()
    loss = BradleyTerryLoss()

    def table() -> Tensor:
        return module.scores(ALL).view(PROMPTS, -1)

    def objective() -> Tensor:
        scores = table()
        return (loss(scores[:, FIRST], scores[:, SECOND], torch.zeros_like(PREFERRED)) * PREFERRED).mean()

    minimise(objective, module.trainable_parameters())
    with torch.no_grad():
        error = (table() - REWARDS) - (table() - REWARDS).mean(-1, keepdim=True)
    assert float(error.abs().max()) < 0.05


def gold(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float(REWARDS[int(p), TEXTS.index(r)]) for p, r in zip(prompts, responses, strict=True)]


def collate(items: list[tuple[int, int, int]]) -> PromptBatch:
    prompts, index, sample = (list(column) for column in zip(*items, strict=True))
    padded = Sequences.pad([[STOP, prompt] for prompt in prompts], [[False, False]] * len(prompts))
    texts = tuple(str(prompt) for prompt in prompts)
    return PromptBatch(padded, torch.tensor(index), torch.tensor(sample), texts, tuple({} for _ in prompts), 4096)


def marginal(table: Tensor) -> Tensor:
    """[prompts, responses] log-probs of responses → [prompts, first token]."""
    return torch.stack(
        [table[:, [response[0] == token for response in RESPONSES]].logsumexp(-1) for token in range(VOCABULARY)], -1
    )


def bandit(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The reward of a single token: the table's entries for "", "a", "b", …"""
    return [
        float(BANDIT[int(p), ["a", "b", "c", "d", "e", ""].index(r)]) for p, r in zip(prompts, responses, strict=True)
    ]


BANDIT = REWARDS[:, :VOCABULARY]


def run_ppo(base: Base, rollouts: int, tokens: int, learning_rate: float = 5e-3) -> float:
    """Total variation to π* after so many rollouts of 1020 responses, the learning rate annealed to 0."""
    module = tiny.make_ppo(
        base,
        reward=RewardFromFunction(gold if tokens == 2 else bandit),
        kl=FixedKL(BETA),
        sampling=Sampling(max_new_tokens=tokens, rows_at_once=1020),
        critic=Critic(init="policy"),
        value_loss=ClippedValueLoss(clip=None, coefficient=0.5),
    ).double()
    loader = RolloutLoader(range(PROMPTS), collate, module.rollout, 1020, 1, 255, 4)
    optimizer = Optimizer(eps=1e-5).build(module.trainable_parameters(), learning_rate)
    steps, done = rollouts * len(loader), 0
    for _ in range(rollouts):
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - done / steps)
            tiny.Step(module, batch)
            optimizer.step()
            done += 1
    with torch.no_grad():
        policy, reference = responses_logprobs(module, "policy"), responses_logprobs(module, "reference")
    if tokens == 1:
        return distance(marginal(policy), optimum(marginal(reference), BANDIT))
    return distance(policy, optimum(reference))


def flip_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_file, "estimate_kl", lambda logratio, estimator: -logratio)


def score_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewards(self: PPO, scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
        placed = torch.where(mask, -penalty, 0.0)
        placed[torch.arange(len(mask)), mask.int().argmax(-1)] += scores
        return placed

    monkeypatch.setattr(PPO, "_token_rewards", rewards)


def test_ppo_reaches_the_optimum_of_one_token(base: Base) -> None:
    assert run_ppo(base, 30, tokens=1, learning_rate=1e-2) < 0.03


def test_ppo_with_the_penalty_flipped_does_not(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_the_penalty(monkeypatch)
    assert run_ppo(base, 6, tokens=1) > 0.2


@pytest.mark.soak
def test_ppo_reaches_the_optimum_of_sequences(base: Base) -> None:
    assert run_ppo(base, 160, tokens=2, learning_rate=4e-3) < 0.02


@pytest.mark.soak
@pytest.mark.parametrize("fault", [flip_the_penalty, score_the_first_token])
def test_ppo_with_a_fault_does_not(
    base: Base, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert run_ppo(base, 40, tokens=2) > 0.2
