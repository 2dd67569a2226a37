"""What the algorithms that write text share: answering prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from rlhf_lit.batches import PromptBatch
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import context_length, stop_ids, unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.rope import first_context, leaves_room, room
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Engine, Samples, Sampling, sample
from rlhf_lit.rollout.rewards import shown
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine

# The stream of sampling noise for validation, predictions and samples: apart from every rollout's.
EVALUATION = 2**31


class Writer(LightningModule):
    """Mixin of the algorithms with a policy that answers prompts: ``class SFT(Writer, Algorithm)``.

    Attributes:
        roles: the models, the policy among them.
        sampling: how responses are drawn; set by the algorithm.
        engine: what draws them.
        vllm: settings of the engine where that is vLLM; set by who sets the engine.
        base, tokenizer: the policy's.
    """

    base: Base
    roles: Roles
    sampling: Sampling
    engine: Engine = staticmethod(sample)
    vllm: VLLM | None = None
    tokenizer: Any

    def leaves_room(self, prompt: int) -> bool:
        """Whether a prompt of so many tokens leaves room for a response: one of ``sampling.max_new_tokens``, or any."""
        return leaves_room(self.roles.policy, prompt, self.sampling.max_new_tokens or 1)

    def respond(self, prompts: PromptBatch, stream: int = EVALUATION, at_most: int | None = None) -> Samples:
        """One response per row, drawn with noise keyed by (seed, stream, prompt index, sample).

        Args:
            prompts: what to answer.
            stream: keeps one round of sampling apart from another: the number of the rollout, in training.
            at_most: tokens of the longest response, where fewer than ``sampling`` says; None is as it says.

        Raises:
            UserError: a prompt leaves no room for its response, in the model's context or in the one that it was first
                trained on, where it has other rotary frequencies beyond it.
        """
        if not len(prompts):
            with self.roles.acting("policy") as model, sharding_of(model).whole():  # with the ranks that have rows
                nothing = prompts.prompts
                return Samples(nothing, torch.zeros(nothing.tokens.shape, device=self.device), nothing.lengths.bool())
        limits = self._limits(prompts, at_most)
        keys = row_keys(derive_seed("sampling", stream), prompts.index, prompts.sample)
        with self.roles.acting("policy") as model, sharding_of(model).whole():
            stops = stop_ids(self.tokenizer, model)
            responses: list[list[int]] = [[] for _ in limits]
            logprobs: list[Tensor] = [torch.empty(0)] * len(limits)
            for limit in sorted(set(limits)):
                sampling = replace(self.sampling, max_new_tokens=limit)
                rows = torch.tensor([row for row, own in enumerate(limits) if own == limit])
                if len(rows) == len(limits):  # as a rule, all
                    return self.engine(model, prompts.prompts, keys, sampling, stops)
                drawn = self.engine(model, prompts.prompts.select(rows), keys[rows.to(keys.device)], sampling, stops)
                for i, row in enumerate(rows.tolist()):
                    mask = drawn.sequences.mask[i]
                    responses[row] = drawn.sequences.tokens[i][mask].tolist()
                    logprobs[row] = drawn.sampled_logprobs[i][mask]
            return Samples.collect(prompts.prompts, responses, logprobs, stops)

    def _limits(self, prompts: PromptBatch, at_most: int | None) -> list[int]:
        """Tokens of the longest response to each prompt."""
        lengths = prompts.prompts.lengths.tolist()
        row = max(range(len(lengths)), key=lengths.__getitem__)
        asked, context = f"the prompt {shown(prompts.texts[row])}", context_length(self.roles.policy)
        named = self.sampling.max_new_tokens
        limit = min(self.sampling.limit, at_most or self.sampling.limit)
        if named is None:
            rooms = {n: room(self.roles.policy, n) for n in {*lengths}}  # each asks the model's config
            limits = [limit if (left := rooms[n]) is None else min(limit, left) for n in lengths]
            if min(limits) < 1:
                raise UserError(
                    f"{asked} has {lengths[row]} tokens, and leaves no room for a response in the model's context of "
                    f"{context}; shorten it, or lower data.max_length"
                )
            return limits
        if context is not None and lengths[row] + limit > context:
            raise UserError(
                f"model.sampling.max_new_tokens: after {asked} a response may reach {lengths[row] + limit} tokens, and "
                f"the model's context is {context}; lower it, or data.max_length"
            )
        crossing = [n for n in {*lengths} if not leaves_room(self.roles.policy, n, limit)]
        if crossing:
            raise UserError(
                f"model.sampling.max_new_tokens: after a prompt of {max(crossing)} tokens a response may reach "
                f"{max(crossing) + limit}, and at {first_context(unwrapped(self.roles.policy))} "
                "the model changes the rotary frequencies of all tokens (LongRoPE), so that none would be as it was "
                "when it was written; lower it, or data.max_length"
            )
        return [limit] * len(lengths)

    def teardown(self, stage: str) -> None:
        if isinstance(self.engine, VLLMEngine):
            self.engine.close()

    def response_texts(self, samples: Samples) -> list[str]:
        """The responses as text, without special tokens and surrounding white space (a template may put a space
        between the role's name and the answer)."""
        sequences = samples.sequences
        ids = [row[mask].tolist() for row, mask in zip(sequences.tokens.cpu(), sequences.mask.cpu(), strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # of no ids it makes one text
        return [text.strip() for text in texts]

    def completions(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        """Prompts and responses as text, for files and people."""
        return self.records_of(prompts, self.respond(prompts))

    def records_of(self, prompts: PromptBatch, samples: Samples) -> list[dict[str, Any]]:
        """Samples as text, one record per row."""
        return [
            {"prompt": prompt, "response": response, "tokens": int(tokens), "ended": bool(ended)}
            for prompt, response, tokens, ended in zip(
                prompts.texts,
                self.response_texts(samples),
                samples.sequences.mask.sum(-1),
                samples.ended,
                strict=True,
            )
        ]

    def sample_completions(self) -> list[dict[str, Any]]:
        """Completions of the data module's sample prompts."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        prompts = datamodule.sample_prompts() if datamodule is not None else None
        if prompts is None:
            return []
        # Samples are for people to read: a prompt too long for the context is left out, and ends no training run.
        kept = [row for row, n in enumerate(prompts.prompts.lengths.tolist()) if self.leaves_room(n)]
        prompts = prompts.select(torch.tensor(kept, dtype=torch.int64))
        if not len(prompts):
            return []
        training = {name: module.training for name, module in self.named_modules()}
        self.eval()
        with torch.no_grad():
            records = self.completions(prompts.to(self.device))
        for name, module in self.named_modules():
            module.training = training.get(name, module.training)
        return records

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Completions of a batch of prompts (none where the last one is smaller than the number of ranks)."""
        return self.completions(batch)
