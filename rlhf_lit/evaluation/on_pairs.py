"""The part of an evaluation in which a model judges a file of pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.batches.micro_batches import cut_by_tokens
from rlhf_lit.data.records import Source
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.pairs import Score, pair_report, read_contests, score_contests
from rlhf_lit.evaluation.report import Evaluation
from rlhf_lit.evaluation.setup import Setup, is_reward_model
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.anatomy import context_length
from rlhf_lit.models.loading import load_scorer, load_tokenizer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.rollout.rewards import score_sequences


def on_pairs(found: Evaluation, setup: Setup, model: str, reference: str | None, source: Source) -> Evaluation:
    """Let a reward model score the answers; or, beside a reference, a policy by its implicit reward.

    Args:
        found: what is known so far.
        setup: how to carry it out.
        model, reference: as the command's options; no reference means that the model is a reward model.
        source: of the pairs.

    Returns:
        The evaluation with that part of it.
    """
    contests, report = read_contests(source, setup.on_bad_row)
    score, context = _reward_model(model, setup) if reference is None else _log_ratio(model, reference, setup)
    tokenizer = load_tokenizer(setup.base(model))
    scored = score_contests(contests, score, tokenizer, context, setup.template, report)
    return replace(found, files={**found.files, "pairs": report}, pairs=pair_report(*scored))


def _reward_model(model: str, setup: Setup) -> tuple[Score, int | None]:
    if Path(setup.base(model).folder).is_dir() and not is_reward_model(model):
        raise UserError(f"pairs: {model} is no reward model; name --reference to judge by its log-ratio to that")
    scorer = load_scorer(setup.base(model), trained=True, frozen=True).to(setup.device)

    def score(sequences: Sequences) -> Tensor:
        return score_sequences(scorer, sequences.to(setup.device), setup.micro_batch_tokens)

    return score, context_length(scorer)


def _log_ratio(model: str, reference: str, setup: Setup) -> tuple[Score, int | None]:
    """Σ_t log π(y_t) − log π₀(y_t): the implicit reward of Rafailov et al. 2023 (Eq. 5) without its β."""
    policy = setup.policy(model, reference)

    @torch.no_grad()
    def score(sequences: Sequences) -> Tensor:
        ratios = torch.zeros(len(sequences), dtype=torch.float64)
        for rows in cut_by_tokens(sequences.lengths, setup.micro_batch_tokens):
            part = sequences.select(rows).to(setup.device)
            with policy.roles.acting("policy") as ours:
                logprobs = token_logprobs(ours, part)
            with policy.roles.acting("reference") as theirs:
                logprobs = logprobs - token_logprobs(theirs, part)
            ratios[rows] = row_sums(logprobs, part.mask).double().cpu()
        return ratios

    return score, context_length(policy.roles.policy)
