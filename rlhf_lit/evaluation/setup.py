"""How an evaluation is carried out: the same for all its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.data.chat import Template
from rlhf_lit.data.records import OnBadRow
from rlhf_lit.errors import UserError
from rlhf_lit.export.trained import Trained
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.quantization import Dtype
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.vllm_engine import VLLM


@dataclass(frozen=True)
class Setup:
    """What the command's options of the same names say.

    Attributes:
        samples: responses to each prompt.
        best_of: the n of best-of-n.
        sampling: length and temperature.
        template: how conversations become text.
        on_bad_row: what a bad row leads to.
        dtype: of the weights.
        micro_batch_tokens: padded tokens that go through the device at once.
        device: where models work.
        vllm: draw responses with vLLM; None draws with transformers.
    """

    samples: int
    best_of: tuple[int, ...]
    sampling: Sampling
    template: Template
    on_bad_row: OnBadRow
    dtype: Dtype
    micro_batch_tokens: int
    device: torch.device
    vllm: VLLM | None = None

    def base(self, name: str) -> Base:
        """The model of that name, in the width asked for."""
        return Base(name=name, dtype=self.dtype)

    def policy(self, name: str, reference: str | None = None) -> SFT:
        """A policy that can be sampled from, beside the reference it is compared with, on the device, in eval mode.

        Raises:
            UserError: one of them is a reward model, or cannot be loaded.
        """
        for one in (name, reference):
            if one is not None and is_reward_model(one):
                raise UserError(
                    f"{one} is a reward model and writes no responses: give it as --judge, or --pairs alone"
                )
        module = SFT(self.base(name), sampling=self.sampling)
        module.configure_model()
        if reference is not None:
            module.roles.use_reference(load_causal_lm(self.base(reference)))
        return module.to(self.device).eval()


def is_reward_model(name: str) -> bool:
    """Whether a folder holds a reward model: its weights would load as a language model's where the head is tied. Of a
    hub name this is not asked."""
    return Path(Base(name=name).folder).is_dir() and Trained.find(name, trust_remote_code=False).scorer
