"""Scalar heads: pooled at the last real token, whatever stands beside or after it."""

import pytest
import tiny
import torch

from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.heads import apply_head, scalar_head, sequence_scores, token_values
from rlhf_lit.models.loading import load_scorer
from rlhf_lit.models.packing import hidden_states
from rlhf_lit.rollout.rewards import score_sequences


def score(model: torch.nn.Module, sequences: Sequences) -> torch.Tensor:
    with torch.no_grad():
        return sequence_scores(model, unwrapped(model).score, sequences)


def rows_of(sequences: Sequences) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(sequences.tokens, sequences.lengths, strict=True)]


def unpadded(row: list[int]) -> Sequences:
    return Sequences.pad([row], [[False] * len(row)])


def test_scores_do_not_depend_on_company_padding_or_order(llama: str) -> None:
    model = load_scorer(Base(name=llama))
    sequences = tiny.sequences([*tiny.RAGGED, (20, 18)])
    together = score(model, sequences)
    alone = torch.cat([score(model, unpadded(row)) for row in rows_of(sequences)])
    wide = score(model, tiny.widen(tiny.SupervisedBatch(sequences, 1), 9).sequences)
    backwards = score(model, sequences.select(torch.arange(7, -1, -1))).flip(0)
    for other in (alone, wide, backwards):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-5)
    assert float(together.std()) > 0.05
    for budget in (1, 40, tiny.EVERYTHING):
        torch.testing.assert_close(score_sequences(model, sequences, budget), together, rtol=1e-5, atol=1e-5)


def test_the_score_is_read_at_the_last_real_token(llama: str) -> None:
    """One EOS, two EOS and an EOS in the prompt are three different last tokens, though EOS is also the pad."""
    model = load_scorer(Base(name=llama))
    row = [1, 9, tiny.EOS, 7, tiny.EOS]
    ends = [row, [*row, tiny.EOS], row[:4]]
    scores = score(model, Sequences.pad(ends, [[False] * len(end) for end in ends]))
    for end, value in zip(ends, scores, strict=True):
        with torch.no_grad():
            states = hidden_states(model, torch.tensor([end]))[0, -1]
            expected = unwrapped(model).score(states)
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert len({round(float(value), 4) for value in scores}) == 3


def test_the_head_is_drawn_with_the_published_spread() -> None:
    torch.manual_seed(0)
    head = scalar_head(20_000).requires_grad_(False)
    assert float(head.weight.std()) == pytest.approx(20_001**-0.5, rel=0.02)
    assert float(head.weight.mean()) == pytest.approx(0, abs=3 * 20_001**-0.5 / 20_000**0.5)
    assert float(head.bias) == 0.0


def test_a_fresh_score_head_is_drawn_with_the_published_spread(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for seed in range(40):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        weights.append(unwrapped(load_scorer(Base(name=llama))).score.weight.detach())
    assert float(torch.cat(weights).std()) == pytest.approx(33**-0.5, rel=0.06)


def test_heads_stay_in_float32() -> None:
    torch.manual_seed(0)
    head, states = scalar_head(32), torch.randn(5, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = apply_head(head, states)
    assert values.dtype == torch.float32
    assert values.equal(head(states.float()).squeeze(-1))


def test_values_stand_at_the_token_they_precede(llama: str) -> None:
    """V of the state before token t is the head on the hidden state of token t − 1; it does not see token t."""
    model = unwrapped(load_scorer(Base(name=llama)))
    sequences = tiny.sequences([(2, 4)])
    with torch.no_grad():
        values = token_values(model, model.score, sequences)
        states = hidden_states(model, sequences.tokens)
        for t in sequences.mask[0].nonzero().flatten().tolist():
            assert values[0, t].item() == pytest.approx(float(model.score(states[0, t - 1])), abs=1e-6)
        changed = Sequences(sequences.tokens.clone(), sequences.lengths, sequences.mask)
        changed.tokens[0, 7] = 11
        after = token_values(model, model.score, changed)
    assert not values[~sequences.mask].any()
    assert after[0, :8].equal(values[0, :8])
    assert not after[0, 8].equal(values[0, 8])
