"""The tokenizer and the model configuration of the built-in world, and the folder that holds them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lit.playground.grammar import FACTS, LARGEST_OPERAND, WORDS, Task, plural, table
from rlhf_lit.playground.world import WORDY, WORDY_REFUSALS

if TYPE_CHECKING:  # the command line reads `World` without paying for transformers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
PIECES = 448  # every word of the list is one piece
ALPHABET = string.ascii_letters + string.digits + ".,?!:+-'▁"

# <bos>instruction\nresponse<eos>, turn after turn. The newline is the assistant's header.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n' }}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the playground template knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


def _corpus() -> list[str]:
    """Text to count pieces in: instructions and the words of answers, but no spelled-out ones.

    Reversed and upper-case words are left to single letters, which is also what makes spelling learnable.
    """
    by_kind: dict[str, list[Task]] = {}
    for task in table().values():
        by_kind.setdefault(task.kind, []).append(task)
    lines = [task.prompt for tasks in by_kind.values() for task in tasks[:: max(1, len(tasks) // 400)]]
    lines += [word for word in WORDS for _ in range(20)]
    lines += [plural(word) for word in WORDS]
    lines += [text for facts in FACTS.values() for pair in facts.items() for text in pair for _ in range(4)]
    lines += [str(number) for number in range(2 * LARGEST_OPERAND + 1) for _ in range(40)]
    lines += [frame.format("") for frame in (*WORDY, *WORDY_REFUSALS) for _ in range(100)]
    return lines


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The world's byte-pair tokenizer, trained on its own grammar in about a second; the same every time."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    # "lamp" is the same piece at the start of a response as within a sentence: every stretch of text gets the mark of
    # a preceding space, and the decoder takes it away again.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always", split=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            *(decoders.Replace(f"{mark}▁", mark) for mark in ("\n", BOS, EOS)),
            decoders.Replace("▁", " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES - 1,  # the newline comes on top
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=list(ALPHABET),
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # A token of its own, so that the response begins at a token boundary whatever it starts with.
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of about 0.6 million parameters for this tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def write_model_folder(folder: str | Path) -> None:
    """Write what ``base: {name: playground}`` loads: tokenizer and configuration, no weights.

    The package's own ``models/playground`` was made by this function.
    """
    from transformers import GenerationConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    config = model_config(tokenizer)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers writes the template to a file of its own; inside the tokenizer's configuration it travels as one.
    template = folder / "chat_template.jinja"
    if template.exists():
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["chat_template"] = template.read_text(encoding="utf-8")
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        template.unlink()
