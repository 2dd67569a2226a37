"""Small models and data sets under the names that they have on the hub, in the caches that its clients read offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

COMMIT = "0" * 40
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip

# The hub's name → the family, its special tokens, how the tokenizer names them, its template, and what generate stops
# at (a list where the published model has one).
MODELS: dict[str, tuple[str, list[str], dict[str, str], str | None, list[str]]] = {
    "Qwen/Qwen2.5-0.5B": (
        "qwen2", QWEN, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, CHATML, ["<|endoftext|>"],
    ),
    "meta-llama/Llama-3.1-8B": (
        "llama", LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, None, ["<|end_of_text|>"],
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "llama", LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, LLAMA_3,
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
}  # fmt: skip
MODELS["Qwen/Qwen2.5-0.5B-Instruct"] = (
    "qwen2", QWEN, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML, ["<|im_end|>", "<|endoftext|>"],
)  # fmt: skip
MODELS["Qwen/Qwen2.5-7B"] = MODELS["Qwen/Qwen2.5-0.5B"]
MODELS["Qwen/Qwen2.5-7B-Instruct"] = MODELS["Qwen/Qwen2.5-0.5B-Instruct"]

ROWS = 12


def _turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _question(i: int) -> str:
    return f"what is {i} plus {i + 1}?"


def _ultrafeedback(i: int) -> dict[str, Any]:
    chosen, rejected = _turns(_question(i), f"{2 * i + 1}."), _turns(_question(i), "i cannot help with that.")
    return {"chosen": chosen, "rejected": rejected, "score_chosen": 8.5, "score_rejected": 3.0 + i % 3}


def _ranked(i: int) -> dict[str, Any]:
    answers = [f"{2 * i + 1}.", f"it is {2 * i + 1}.", f"{2 * i}.", "i cannot help with that."]
    completions = [
        {"model": f"model-{k}", "principle": "helpfulness", "response": answer, "overall_score": score,
         "fine-grained_score": score / 2, "critique": "as it is", "custom_system_prompt": "help"}
        for k, (answer, score) in enumerate(zip(answers, (9.0, 7.5, 3.0, 1.0), strict=True))
    ]  # fmt: skip
    return {
        "source": "sharegpt", "instruction": _question(i), "models": [c["model"] for c in completions],
        "completions": completions, "correct_answers": ["None"], "incorrect_answers": ["None"],
    }  # fmt: skip


def _alpaca(i: int) -> dict[str, Any]:
    found = {"instruction": _question(i), "input": "" if i % 2 else "in words", "output": f"{2 * i + 1}."}
    return {**found, "text": "\n\n".join(found.values())}


def _verdict(i: int) -> dict[str, Any]:
    answer = f"{2 * i + 1}." if i % 2 else "i cannot help with that."
    return {"prompt": _turns(_question(i)), "completion": [{"role": "assistant", "content": answer}],
            "label": bool(i % 2)}  # fmt: skip


def _mathematics(i: int) -> dict[str, Any]:
    return {"problem": f"Compute ${i} + {i + 1}$.", "solution": rf"$\boxed{{{2 * i + 1}}}$", "answer": str(2 * i + 1)}


# The hub's name → the configuration, the splits, and row i in the data set's own columns.
DATA_SETS: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "trl-lib/ultrafeedback_binarized": ("default", ("train", "test"), _ultrafeedback),
    "openbmb/UltraFeedback": ("default", ("train",), _ranked),
    "tatsu-lab/alpaca": ("default", ("train",), _alpaca),
    "trl-lib/kto-mix-14k": ("default", ("train", "test"), _verdict),
    "trl-lib/tldr": (
        "default", ("train", "validation", "test"),
        lambda i: {"prompt": f"POST: {_question(i)}\n\nTL;DR:", "completion": f" {2 * i + 1}."},
    ),
    "openai/gsm8k": (
        "main", ("train", "test"),
        lambda i: {"question": _question(i), "answer": f"It is <<{i}+{i + 1}={2 * i + 1}>>.\n#### {2 * i + 1}"},
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": ("default", ("train",), _mathematics),
    "HuggingFaceH4/MATH-500": (
        "default", ("test",),
        lambda i: {**_mathematics(i), "subject": "Algebra", "level": 1 + i % 5, "unique_id": f"test/algebra/{i}.json"},
    ),
}  # fmt: skip


def _save_model(folder: Path, family: str, special: list[str], named: dict[str, str], template: str | None,
                stops: list[str]) -> None:  # fmt: skip
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    begins = tokenizer.bos_token_id if "bos_token" in named else tokenizer.convert_tokens_to_ids(special[0])
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=begins,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=family == "qwen2",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = tokenizer.convert_tokens_to_ids(stops)
    model.generation_config = GenerationConfig(bos_token_id=begins, eos_token_id=ids if len(ids) > 1 else ids[0])
    model.save_pretrained(folder)


def _save_data_set(root: Path, name: str, config: str, splits: tuple[str, ...], row: Any) -> None:
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo, SplitInfo
    from datasets.naming import camelcase_to_snakecase
    from datasets.splits import SplitDict

    owner, _, short = name.partition("/")
    snake = camelcase_to_snakecase(short)
    folder = root / f"{owner}___{snake}" / config / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    data = Dataset.from_list([row(i) for i in range(ROWS)])
    for split in splits:
        file = folder / f"{snake}-{split}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, data.data.schema) as writer:
            writer.write_table(data.data.table)
    found = SplitDict({split: SplitInfo(split, 1, ROWS, dataset_name=snake) for split in splits})
    DatasetInfo(
        features=data.features, builder_name="parquet", dataset_name=snake, config_name=config, version="0.0.0",
        splits=found,
    ).write_to_directory(str(folder))  # fmt: skip


def build(place: Path) -> None:
    """Write all models and data sets under ``place``."""
    for name, what in MODELS.items():
        folder = place / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        _save_model(folder / "snapshots" / COMMIT, *what)
    for name, data in DATA_SETS.items():
        _save_data_set(place / "datasets", name, *data)


@contextmanager
def serving(place: Path) -> Iterator[None]:
    """In this process the hub's clients read from what :func:`build` wrote, and nothing from the network."""
    import datasets.config
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "datasets")
        yield
