"""Hidden states → log-probs: the model's own logits, only where needed, in chunks."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from rlhf_lit.models import logprobs as room
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.logprobs import token_logprobs


def plain_logprobs(model: nn.Module, sequences: tiny.Sequences, temperature: float = 1.0) -> Tensor:
    """The textbook way: all logits, with an attention mask, log-softmax, gather, mask."""
    attention = torch.arange(sequences.tokens.shape[1])[None] < sequences.lengths[:, None]
    logits = model(input_ids=sequences.tokens, attention_mask=attention.long()).logits / temperature
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, sequences.tokens[:, 1:, None]).squeeze(-1)
    return torch.where(sequences.mask, nn.functional.pad(chosen, (1, 0)), 0.0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_models_own_logits(kind: str, temperature: float, tmp_path: Path) -> None:
    model = load_causal_lm(Base(name=tiny.save_model(tmp_path, kind, spread=0.3))).double()
    sequences = tiny.sequences(tiny.RAGGED)
    expected = plain_logprobs(model, sequences, temperature)
    ours = token_logprobs(model, sequences, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert not ours[~sequences.mask].any()
    assert float(ours[sequences.mask].std()) > 0.1


def gradients(model: nn.Module, sequences: tiny.Sequences) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    values = token_logprobs(model, sequences, temperature=0.7)
    (values * torch.arange(values.numel()).view_as(values)).sum().backward()
    return values.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_chunks_change_neither_values_nor_gradients(
    positions: int, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(Base(name=llama)).double()
    sequences = tiny.sequences(tiny.RAGGED)
    values, expected = gradients(model, sequences)
    monkeypatch.setattr(room, "CHUNK_LOGITS", positions * tiny.VOCABULARY)
    assert len(list(room.chunks(model, 40))) == (40 if positions == 1 else 14 if positions == 3 else 1)
    chunked, actual = gradients(model, sequences)
    torch.testing.assert_close(chunked, values, rtol=1e-12, atol=1e-12)
    assert len(actual) == len(expected) == len(list(model.parameters()))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_more_logits_at_once_than_the_limit(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(Base(name=llama))
    monkeypatch.setattr(room, "CHUNK_LOGITS", 4 * tiny.VOCABULARY)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: sizes.append(out[..., 0].numel()))
    sequences = tiny.sequences(tiny.RAGGED)
    token_logprobs(model, sequences)
    assert max(sizes) == 4
    assert sum(sizes) == int(sequences.mask.sum())  # none but the supervised positions


def test_nothing_masked_is_nothing_computed(llama: str) -> None:
    model = load_causal_lm(Base(name=llama))
    sequences = tiny.prompts(3).prompts
    assert not token_logprobs(model, sequences).any()


def test_log_probs_are_float32_for_bfloat16_weights(llama: str) -> None:
    model = load_causal_lm(Base(name=llama, dtype="bfloat16"))
    assert token_logprobs(model, tiny.sequences(tiny.RAGGED)).dtype == torch.float32
