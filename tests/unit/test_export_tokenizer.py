"""The tokenizer beside an exported reward model cuts text as the one it was trained with did."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lit.models.saving import _pad_token

TEXTS = ["great!! yes! wow!!", "! ", "a wow wow"]
END = "<|endoftext|>"


def gpt2_like(*others: str) -> Any:
    """Bytes and merges; one special token for everything, as GPT-2 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["wow!! great!! yes!! wow!!"] * 9, trainer)
    inner.add_special_tokens([END, *others])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, unk_token=END)


@pytest.mark.parametrize(("others", "pad"), [((), None), (("<|vision_pad|>",), "<|vision_pad|>")])
def test_a_pad_token_that_is_not_eos_changes_no_tokens(tmp_path: Path, others: tuple[str, ...], pad: str) -> None:
    tokenizer = gpt2_like(*others)
    before = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokenizer.pad_token = _pad_token(tokenizer)
    assert tokenizer.pad_token != END
    assert pad in (None, tokenizer.pad_token)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == before
    assert again.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
