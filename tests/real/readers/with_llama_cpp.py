"""A GGUF's greedy answers, and log-probs of one row, by llama.cpp: a request as JSON on standard input, the results as
JSON in the file named last.

Runs in an environment that holds llama-cpp-python and not this package.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main() -> None:
    file, answers = sys.argv[1], Path(sys.argv[2])
    request = json.load(sys.stdin)
    # Keys and values in float32, as ours are; llama.cpp's own choice is float16. Its threads spin while they wait for
    # one another, which takes minutes on a busy machine: one.
    settings = {
        "n_ctx": 256,
        "n_threads": 1,
        "n_threads_batch": 1,
        "type_k": GGML_TYPE_F32,
        "type_v": GGML_TYPE_F32,
        "verbose": False,
    }
    model = Llama(file, **settings)
    rows = []
    for turns in request["conversations"]:
        found = model.create_chat_completion(turns, temperature=0, max_tokens=request["tokens"])
        choice = found["choices"][0]
        rows.append(
            {
                "prompt": _prompt(model, turns),
                "read": found["usage"]["prompt_tokens"],
                "text": choice["message"]["content"],
                "ended": choice["finish_reason"] == "stop",
            }
        )
    model = Llama(file, logits_all=True, **settings)
    model.eval(request["row"])
    logits = np.array(model.scores[: len(request["row"])], dtype=np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    picked = [float(logprobs[i, token]) for i, token in enumerate(request["row"][1:])]
    answers.write_text(json.dumps({"rows": rows, "logprobs": picked}))


def _prompt(model: Llama, turns: list) -> list[int]:
    """A conversation's tokens, by the template that stands in the file."""
    names = [model.detokenize([token], special=True).decode() for token in (model.token_eos(), model.token_bos())]
    render = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos_token=names[0], bos_token=names[1])
    found = render(messages=turns)
    return model.tokenize(found.prompt.encode(), add_bos=not found.added_special, special=True)


if __name__ == "__main__":
    main()
