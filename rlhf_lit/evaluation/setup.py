"""How an evaluation is carried out: the same for all its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.data import playground
from rlhf_lit.data.chat import Template
from rlhf_lit.data.records import OnBadRow
from rlhf_lit.models.loading import Base, Dtype, load_causal_lm
from rlhf_lit.rollout.engine import Sampling


@dataclass(frozen=True)
class Setup:
    """What the command's options of the same names say.

    Attributes:
        samples: responses to each prompt.
        best_of: the n of best-of-n.
        sampling: length and temperature.
        template: how conversations become text.
        on_bad_row: what a bad row leads to.
        world: the built-in world.
        dtype: of the weights.
        micro_batch_tokens: padded tokens that go through the device at once.
        device: where models work.
    """

    samples: int
    best_of: tuple[int, ...]
    sampling: Sampling
    template: Template
    on_bad_row: OnBadRow
    world: playground.World
    dtype: Dtype
    micro_batch_tokens: int
    device: torch.device

    def base(self, name: str) -> Base:
        """The model of that name, in the width asked for."""
        return Base(name=name, dtype=self.dtype)

    def policy(self, name: str, reference: str | None = None) -> SFT:
        """A policy that can be sampled from, beside the reference it is compared with, on the device, in eval mode.

        Raises:
            UserError: one of them cannot be loaded.
        """
        module = SFT(self.base(name), sampling=self.sampling)
        module.configure_model()
        if reference is not None:
            module.roles.use_reference(load_causal_lm(self.base(reference)))
        return module.to(self.device).eval()
