"""What transformers, of whichever version runs this, makes of folders with models and tokenizers.

Run as a program in another environment, it writes what it read to a file: ``python reading.py FOLDERS FILE``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ["Hello world! It's 12345.", "  two spaces ", "a\n\tb", "<s>x</s> y <extra> z", "日本 é ünï", ""]


def look(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of texts, and what it holds for special."""
    encoded = [dict(tokenizer(text)) for text in TEXTS]
    return {
        "tokens": encoded,
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "texts": [tokenizer.decode(one["input_ids"]) for one in encoded],
        "skipped": [tokenizer.decode(one["input_ids"], skip_special_tokens=True) for one in encoded],
        "special": sorted(set(tokenizer.all_special_tokens)),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "named": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token],
        "length": [len(tokenizer), tokenizer.model_max_length],
    }


def logits(folder: str, rows: list[list[int]]) -> Any:
    """[rows, time, vocabulary] of the model in a folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), use_cache=False).logits


def main(asked: dict[str, dict[str, Any]], file: str) -> None:
    """Look at a tokenizer, or take the logits of ``rows``, in each folder; → what, or an error, by its name."""
    import torch
    from transformers import AutoTokenizer, __version__

    found: dict[str, Any] = {"version": __version__}
    for folder, what in asked.items():
        try:
            found[folder] = (
                logits(folder, what["rows"]) if "rows" in what else look(AutoTokenizer.from_pretrained(folder))
            )
        except Exception as error:  # one that cannot be read is an answer too
            found[folder] = f"{type(error).__name__}: {error}"
    torch.save(found, file)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
