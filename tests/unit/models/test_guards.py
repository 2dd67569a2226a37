"""What a family does around its head is done by us too, or the family is refused: weights do not hide it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlhf_lit.errors import UserError
from rlhf_lit.models import lm_head
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.logprobs import token_logprobs

# Family → what it puts around its head, on scales at which it shows.
AROUND_THE_HEAD: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "falcon_h1": {"lm_head_multiplier": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
}
families = pytest.mark.parametrize("kind", AROUND_THE_HEAD)


@families
def test_log_probs_are_those_of_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    model = load_causal_lm(Base(tiny.save_model(tmp_path, kind, spread=0.3, **AROUND_THE_HEAD[kind])))
    row = tiny.sequences([(3, 12)])
    with torch.no_grad():
        own = model(input_ids=row.tokens).logits[0, :-1].log_softmax(-1)
        ours = token_logprobs(model, row)[0, 1:]
    expected = own.gather(-1, row.tokens[0, 1:, None])[:, 0]
    masked = row.mask[0, 1:]
    torch.testing.assert_close(ours[masked], expected[masked], rtol=0, atol=5e-6)


@families
def test_fresh_weights_hide_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits are near 0, where a cap changes nothing."""
    folder = tiny.save_model(tmp_path, kind, spread=0.002, **AROUND_THE_HEAD[kind])
    load_causal_lm(Base(folder))
    for table in ("FACTORS", "DIVISORS", "CAPS"):
        monkeypatch.setattr(lm_head, table, ())
    with pytest.raises(UserError, match="changes its logits around the LM head in a way not supported"):
        load_causal_lm(Base(folder))


@pytest.mark.parametrize("kind", ["gemma2", "recurrent_gemma"])
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_a_cap_in_bfloat16_is_no_reason_to_refuse(kind: str, spread: float, tmp_path: Path) -> None:
    """The model's own cap rounds three times to 8 bits; ours is in float32."""
    load_causal_lm(Base(tiny.save_model(tmp_path, kind, spread=spread), dtype="bfloat16"))


def test_a_cap_of_the_text_part_is_read_from_there(tmp_path: Path) -> None:
    """Of a multimodal config, whose own level says nothing of the language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {**tiny.SIZES["gemma2"], "vocab_size": tiny.VOCABULARY, "final_logit_softcapping": 3.0}
    more = {"vocab_size_per_layer_input": tiny.VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    del text["query_pre_attn_scalar"]
    config = AutoConfig.for_model("gemma4", text_config={**text, **more}, vision_config=None, audio_config=None)
    assert not hasattr(config, "final_logit_softcapping")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    model = load_causal_lm(Base(str(tmp_path)))
    row = tiny.sequences([(1, 6)])
    with torch.no_grad():
        own = model(input_ids=row.tokens).logits[0, :-1].log_softmax(-1).gather(-1, row.tokens[0, 1:, None])[:, 0]
        torch.testing.assert_close(token_logprobs(model, row)[0, 1:][row.mask[0, 1:]], own[row.mask[0, 1:]])


def test_what_comes_after_the_logits_unknown_to_us_is_refused(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def capped(self: LlamaForCausalLM, *args: object, **keywords: object) -> object:
        output = forward(self, *args, **keywords)
        output.logits = 100 * torch.tanh(output.logits / 100)
        return output

    load_causal_lm(Base(llama))
    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(UserError, match="LlamaForCausalLM changes its logits around the LM head"):
        load_causal_lm(Base(llama))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bert", tiny.SIZES["llama"]),
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    ],
)
def test_a_model_that_sees_what_comes_is_refused(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    tiny.SIZES.setdefault(kind, sizes)
    folder = tiny.save_model(tmp_path, kind)
    with pytest.raises(UserError, match="lets a token see those after it; a decoder-only model is needed"):
        load_causal_lm(Base(folder))
    with pytest.raises(UserError, match="has no linear `score` head: reward models and"):
        load_scorer(Base(folder))


def test_a_score_that_is_pooled_otherwise_is_refused(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutput

    def mean(self: Any, input_ids: torch.Tensor, **options: Any) -> SequenceClassifierOutput:
        states = self.model(input_ids=input_ids, **options).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(states.mean(1)))

    load_scorer(Base(llama))
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", mean)
    with pytest.raises(UserError, match="does not read its score at the last token by its `score` head alone"):
        load_scorer(Base(llama))


def test_rows_of_a_batch_that_differ_by_rounding_are_no_leak(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads share a batch out, and thirty layers make 6e-6 of the largest logit of it (SmolLM2 on two cores)."""
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def rounded(self: Any, *args: Any, **keywords: Any) -> Any:
        output = forward(self, *args, **keywords)
        states = output.last_hidden_state
        output.last_hidden_state = states * (1 + 1e-3 * torch.arange(len(states)).flip(0))[:, None, None]
        return output

    monkeypatch.setattr(LlamaModel, "forward", rounded)
    load_causal_lm(Base(llama))
    load_scorer(Base(llama))
