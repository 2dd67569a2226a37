"""The rooms on a real pre-trained model, whose tokenizer has no pad token and adds no BOS."""

import os
from pathlib import Path

import pytest
import tiny
import torch

from rlhf_lit.algorithms import DPO
from rlhf_lit.batches import PreferenceBatch, PromptBatch, Sequences
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.rollout.engine import Sampling, sample

DATA = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
STORIES = DATA / "stories260k" / "hf"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no stories260k in {DATA}: set RLHF_LIT_DATA")
BASE = Base(name=str(STORIES))
OPENING = "Once upon a time, there was a little girl named Lily."


def test_greedy_from_bos_tells_the_known_story() -> None:
    tokenizer, model = load_tokenizer(BASE), load_causal_lm(BASE)
    prompt = Sequences.pad([[tokenizer.bos_token_id]] * 2, [[False]] * 2)
    samples = sample(model, prompt, None, Sampling(max_new_tokens=40), (tokenizer.eos_token_id,))
    for row, mask in zip(samples.sequences.tokens, samples.sequences.mask, strict=True):
        assert tokenizer.decode(row[mask]).strip().startswith(OPENING)


def test_log_probs_of_a_ragged_batch() -> None:
    tokenizer, model = load_tokenizer(BASE), load_causal_lm(BASE)
    texts = [OPENING, "The", "She liked to play with her dog in the park. Then she went home."]
    rows = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    sequences = Sequences.pad(rows, [[False] + [True] * (len(row) - 1) for row in rows])
    with torch.no_grad():
        ours = token_logprobs(model, sequences)
        for i, row in enumerate(rows):
            logprobs = model(torch.tensor([row])).logits[0].log_softmax(-1)
            expected = logprobs[:-1].gather(-1, torch.tensor(row[1:])[:, None]).squeeze(-1)
            torch.testing.assert_close(ours[i, 1 : len(row)], expected, rtol=1e-4, atol=1e-4)
    assert float(ours[0].mean()) > -2  # a sentence it knows well


def test_step_zero_and_micro_batches() -> None:
    tokenizer = load_tokenizer(BASE)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a cat", "the big dog ran", "Lily")]
    sides = [
        Sequences.pad(
            [[1, *prompt, *answer, tokenizer.eos_token_id] for prompt, answer in zip(rows, answers, strict=True)],
            [[False] * (1 + len(p)) + [True] * (1 + len(a)) for p, a in zip(rows, answers, strict=True)],
        )
        for answers in (rows[::-1], [[7], [9, 9, 9], [40, 41]])
    ]
    module = tiny.build(DPO(BASE, DPOLoss(beta=0.1)))
    batches = [PreferenceBatch(sides[0], sides[1], torch.zeros(3), budget) for budget in (1, 1000)]
    steps = [tiny.Step(module, batch) for batch in batches]
    for step in steps:
        assert step.totals["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert step.totals["margin"] == 0.0
    steps[0].assert_equals(steps[1], 1e-5)

    ppo = tiny.make_ppo(BASE)
    index = torch.arange(6)
    prompts = Sequences.pad([[1, *rows[i % 3]] for i in range(6)], [[False] * (1 + len(rows[i % 3])) for i in range(6)])
    batch = PromptBatch(prompts, index, index * 0, ("",) * 6, tuple({} for _ in range(6)), 10_000)
    step = tiny.Step(ppo, ppo.rollout(batch, 0))
    assert step.totals["policy/approxkl"] == 0.0
    assert ppo.rollout_metrics["objective/kl_exact"] == 0.0
