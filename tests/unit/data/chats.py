"""A small tokenizer, chat templates of several kinds, and a dialogue."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lit.data.chat import Encoded
from rlhf_lit.data.rows import Message

HEAD = "{{'<|im_start|>' + m['role'] + '\\n'}}"
CHATML = (
    "{% for m in messages %}" + HEAD + "{{m['content'] + '<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
CHATML_BLOCKS = (  # as published templates have it: the end mark outside the block
    "{% for m in messages %}"
    + HEAD
    + "{% if m['role'] == 'assistant' %}{% generation %}{{m['content']}}{% endgeneration %}"
    "{% else %}{{m['content']}}{% endif %}{{'<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
LLAMA3 = (
    "{{bos_token}}{% for m in messages %}"
    "{{'<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|start|>assistant<|end|>\\n\\n'}}{% endif %}"
)
REASONING = (  # earlier turns lose their thoughts, the last one shows an empty one (Qwen 3)
    "{% for m in messages %}" + HEAD + "{% if m['role'] == 'assistant' and loop.last %}{{'<think>\\n\\n'}}{% endif %}"
    "{{m['content'] + '<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{m['content'] + eos_token}}{% endfor %}"
)
GEMMA = (  # no system turn, and its own name for the assistant
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "Hi there"),
    Message("assistant", "Hello you!"),
    Message("user", "What is 2+2?"),
    Message("assistant", "It is 4."),
)


def small(template: str | None = None, bos: str | None = None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, among them ones that cross word boundaries ("dog" from "do" + "g")."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|eot|>", "<|start|>", "<|end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    core.train_from_iterator(["dog dog dog Hello there It is 4 What assistant system user"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def supervised(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The text of each run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, on in zip(encoded.tokens, encoded.mask, strict=True):
        if on:
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = on
    return [tokenizer.decode(run) for run in runs]
