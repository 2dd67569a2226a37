"""How far an exported model is from the one that was trained, on the same tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.export.trained import Trained, on_device
from rlhf_lit.models.lm_head import logits
from rlhf_lit.models.packing import hidden_states
from rlhf_lit.models.scorers import stored_bias
from rlhf_lit.rollout.rewards import score_sequences

# What exported and trained model are compared on. Their logits stand in memory together: 0.6 GB for 150 000 tokens.
COMPARED_ROWS = 4
COMPARED_TOKENS = 128


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the one that was trained.

    Attributes:
        largest: of the absolute differences of their logits.
        scale: the largest absolute logit of the trained one.
        rows: what they were compared on, in words.
    """

    largest: float
    scale: float
    rows: str

    def __str__(self) -> str:
        return (
            f"largest logit difference to the run's own model {self.largest:.3g} (its logits reach {self.scale:.3g}), "
            f"on {self.rows}"
        )


def compared_on(found: Trained, tokenizer: Any, limit: int) -> tuple[list[Tensor], str]:
    """[1, time] rows of tokens, and what they are: the run's last samples, or random tokens where it has none."""
    file = found.run / "samples.jsonl" if found.run else None
    if file is not None and file.is_file():
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[-COMPARED_ROWS:]]
        chat = ChatFormat(tokenizer)
        turns = [(Message("user", row["prompt"]), Message("assistant", row["response"])) for row in samples]
        rows = [chat.demonstration(pair).tokens[:limit] for pair in turns]
        if rows:
            return [torch.tensor([row]) for row in rows], f"{len(rows)} of the run's samples"
    # No special tokens: a classifier of transformers looks for the last one that is not the pad.
    ordinary = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    picks = torch.randint(len(ordinary), (COMPARED_ROWS, limit), generator=torch.Generator().manual_seed(0))
    return list(ordinary[picks].split(1)), f"{COMPARED_ROWS} rows of random tokens"


@torch.no_grad()
def trained_outputs(model: nn.Module, rows: list[Tensor], scorer: bool) -> list[Tensor]:
    """Logits, or a reward model's scores, through the forward pass of training."""
    device = next(model.parameters()).device
    if scorer:
        sequences = (Sequences.pad([row[0].tolist()], [[True] * row.shape[1]]).to(device) for row in rows)
        return [score_sequences(model, sequence, COMPARED_TOKENS).cpu() for sequence in sequences]
    return [logits(model, hidden_states(model, row.to(device))).cpu() for row in rows]


@torch.no_grad()
def plain_outputs(folder: Path, rows: list[Tensor], scorer: bool, trust_remote_code: bool) -> list[Tensor]:
    """The same of a folder with whole weights, by someone without this package."""
    import transformers

    auto = transformers.AutoModelForSequenceClassification if scorer else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    model = on_device(model.eval())
    device = next(model.parameters()).device
    found = [model(input_ids=row.to(device)).logits.float().cpu() for row in rows]
    return [output[:, 0] + (stored_bias(str(folder)) or 0.0) for output in found] if scorer else found


def largest(tensors: list[Tensor]) -> float:
    """The largest absolute element; nan where there is one."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())
