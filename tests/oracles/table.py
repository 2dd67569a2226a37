"""A language model that is a table, behind the interface of transformers.

The body has nothing to learn: it numbers the prefix that ends at each token and returns the number as a one-hot vector.
A linear head on it is therefore a table with one entry (or one row of logits) for each prefix: `lm_head` of logits, the
`score` head of rewards, and a value head of values. What trains is convex, so that an algorithm which is right reaches
the optimum to many digits, and one which is not cannot blame the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput


class TableConfig(PreTrainedConfig):
    """V tokens, and prefixes of at most so many of them."""

    model_type = "table"

    vocab_size: int = 6
    max_position_embeddings: int = 3
    num_hidden_layers: int = 0  # `generate` makes a key-value cache for them
    tie_word_embeddings: bool = False

    @property
    def hidden_size(self) -> int:
        """How many prefixes there are, the empty one included."""
        return sum(self.vocab_size**length for length in range(self.max_position_embeddings + 1))


def number(prefix: Sequence[int], vocabulary: int) -> int:
    """The number of a prefix of tokens, in bijective base V: token v is the digit v + 1."""
    result = 0
    for token in prefix:
        result = result * vocabulary + token + 1
    return result


class TablePreTrainedModel(PreTrainedModel):
    """The body and what stands on it."""

    config_class = TableConfig
    base_model_prefix = "prefixes"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            digits = torch.arange(1, module.num_embeddings + 1, dtype=module.weight.dtype)
            module.weight.data.copy_(digits[:, None])
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_()


class TableModel(TablePreTrainedModel):
    """[rows, time] tokens → [rows, time, prefixes] one-hot in the ``number`` of the prefix that ends there.

    Padding on the left is the digit 0, which leaves a number as it is.
    """

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.digits = nn.Embedding(config.vocab_size, 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.digits

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> BaseModelOutput:
        # Long has no gradient: an optimizer that is given the digits finds nothing to move them by.
        digits = self.digits(input_ids).squeeze(-1).long()
        if attention_mask is not None:
            digits = digits * attention_mask
        numbers = [torch.zeros_like(digits[:, 0])]
        for digit in digits.unbind(1):
            numbers.append(numbers[-1] * self.config.vocab_size + digit)
        states = self.digits.weight.new_zeros(*input_ids.shape, self.config.hidden_size)
        states.scatter_(-1, torch.stack(numbers[1:], -1)[..., None], 1)
        return BaseModelOutput(last_hidden_state=states)


class TableForCausalLM(TablePreTrainedModel, GenerationMixin):
    """A table of logits, [prefixes, V]."""

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.prefixes = TableModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **state: Any) -> dict[str, Any]:
        """The whole prefix each time: there is nothing to keep of the earlier tokens."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutput:
        states = self.prefixes(input_ids, attention_mask).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states))


class TableForSequenceClassification(TablePreTrainedModel):
    """A table of scores, [prefixes], read at the last of a row's tokens."""

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.prefixes = TableModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.score(self.prefixes(input_ids).last_hidden_state[:, -1]))


AutoConfig.register("table", TableConfig)
AutoModel.register(TableConfig, TableModel)
AutoModelForCausalLM.register(TableConfig, TableForCausalLM)
AutoModelForSequenceClassification.register(TableConfig, TableForSequenceClassification)


def save_table(folder: Path, letters: list[str], seed: int) -> str:
    """A random table over the given letters, the last of them EOS, with a tokenizer of one token a letter.

    → the folder's name.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    config = TableConfig(vocab_size=len(letters), bos_token_id=None, eos_token_id=len(letters) - 1)
    torch.manual_seed(seed)
    TableForCausalLM(config).save_pretrained(folder)
    inner = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=letters[-1]).save_pretrained(folder)
    return str(folder)
