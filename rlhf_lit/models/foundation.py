"""Which frozen weights an adapter was trained on, so that it is never put on others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError
from rlhf_lit.models.adapter_names import adapter_of, plain_name

FILE = "base.json"
# Elements of each weight that the fingerprint reads, evenly spread.
SAMPLED = 256


@dataclass(frozen=True)
class Foundation:
    """The frozen base under an adapter, as it was loaded.

    Attributes:
        name: its folder or hub name.
        quantization: the fields of ``Quantization``; None for full precision.
        fingerprint: of the body's weights: a digest of names, shapes and evenly spread elements, rounded to bfloat16 so
            that the width they were loaded in makes no difference. 4-bit weights count by name and shape alone, since
            devices round them differently.
    """

    name: str
    quantization: dict[str, Any] | None
    fingerprint: str

    def save(self, folder: Path) -> None:
        """Write ``base.json`` beside the adapter."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> Foundation | None:
        """What ``base.json`` says; None in a folder without one, as other tools leave it."""
        file = Path(folder) / FILE
        return cls(**json.loads(file.read_text())) if file.is_file() else None

    def require_same(self, found: Foundation, adapter: str, field: str) -> None:
        """Refuse to put an adapter that was trained on this base on another one.

        Args:
            found: the present base.
            adapter: the adapter's folder, for the message.
            field: the config key that named it.

        Raises:
            UserError: the two differ; says in what.
        """
        if self.fingerprint == found.fingerprint and self.quantization == found.quantization:
            return
        for what, theirs, ours in (
            ("quantization", _words(self.quantization), _words(found.quantization)),
            ("name", self.name, found.name),
        ):
            if theirs != ours:
                raise UserError(
                    f"{field}: the adapter in {adapter} was trained on a base with {what} {theirs}, and this one has "
                    f"{ours}; train both on the same base"
                )
        raise UserError(
            f"{field}: the weights of {found.name} are not those that the adapter in {adapter} was trained on"
        )


def _words(quantization: dict[str, Any] | None) -> str:
    return "none" if quantization is None else " ".join(f"{key}={value}" for key, value in quantization.items())


@torch.no_grad()
def fingerprint(body: nn.Module) -> str:
    """A digest of a body's frozen weights, the same with and without adapters around them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(_frozen(body).items()):
        digest.update(f"{name} {tuple(getattr(weight, 'quant_state', weight).shape)} ".encode())
        if not hasattr(weight, "quant_state"):
            digest.update(_sample(weight).tobytes())
    return digest.hexdigest()


def _frozen(body: nn.Module) -> dict[str, Tensor]:
    """The weights by the names they have without adapters."""
    return {plain_name(name): p for name, p in body.named_parameters() if adapter_of(name) is None}


def _sample(weight: Tensor) -> Any:
    """Evenly spread elements as bytes."""
    flat = weight.detach().reshape(-1)
    step = max(1, len(flat) // SAMPLED)
    return flat[::step][:SAMPLED].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy()
