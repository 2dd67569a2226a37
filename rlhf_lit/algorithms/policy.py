"""What the algorithms that write text share: answering prompts."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule

from rlhf_lit.batches import PromptBatch
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import context_length, stop_ids, unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.rope import first_context, leaves_room
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Engine, Samples, Sampling, sample
from rlhf_lit.rollout.rewards import shown
from rlhf_lit.rollout.vllm_engine import VLLMEngine

# The stream of sampling noise for validation, predictions and samples: apart from every rollout's.
EVALUATION = 2**31


class Writer(LightningModule):
    """Mixin of the algorithms with a policy that answers prompts: ``class SFT(Writer, Algorithm)``.

    Attributes:
        roles: the models, the policy among them.
        sampling: how responses are drawn; set by the algorithm.
        engine: what draws them.
        base, tokenizer: the policy's.
    """

    base: Base
    roles: Roles
    sampling: Sampling
    engine: Engine = staticmethod(sample)
    tokenizer: Any

    def respond(self, prompts: PromptBatch, stream: int = EVALUATION) -> Samples:
        """One response per row, drawn with noise keyed by (seed, stream, prompt index, sample).

        Args:
            prompts: what to answer.
            stream: keeps one round of sampling apart from another: the number of the rollout, in training.

        Raises:
            UserError: a prompt and its response may be longer than the model's context, or reach from the context that
                the model was first trained on beyond it, where it has other rotary frequencies there.
        """
        if not len(prompts):
            with self.roles.acting("policy") as model, sharding_of(model).whole():  # with the ranks that have rows
                nothing = prompts.prompts
                return Samples(nothing, torch.zeros(nothing.tokens.shape, device=self.device), nothing.lengths.bool())
        row = int(prompts.prompts.lengths.argmax())
        longest = int(prompts.prompts.lengths[row]) + self.sampling.max_new_tokens
        context = context_length(self.roles.policy)
        if context is not None and longest > context:
            raise UserError(
                f"model.sampling.max_new_tokens: after the prompt {shown(prompts.texts[row])} a response may reach "
                f"{longest} tokens, and the model's context is {context}; lower it, or data.max_length"
            )
        lengths = prompts.prompts.lengths.tolist()
        crossing = [n for n in lengths if not leaves_room(self.roles.policy, n, self.sampling.max_new_tokens)]
        if crossing:
            raise UserError(
                f"model.sampling.max_new_tokens: after a prompt of {max(crossing)} tokens a response may reach "
                f"{max(crossing) + self.sampling.max_new_tokens}, and at {first_context(unwrapped(self.roles.policy))} "
                "the model changes the rotary frequencies of all tokens (LongRoPE), so that none would be as it was "
                "when it was written; lower it, or data.max_length"
            )
        keys = row_keys(derive_seed("sampling", stream), prompts.index, prompts.sample)
        with self.roles.acting("policy") as model, sharding_of(model).whole():
            return self.engine(model, prompts.prompts, keys, self.sampling, stop_ids(self.tokenizer, model))

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
        lengths, new_tokens = prompts.prompts.lengths.tolist(), self.sampling.max_new_tokens
        kept = [row for row, n in enumerate(lengths) if leaves_room(self.roles.policy, n, new_tokens)]
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
