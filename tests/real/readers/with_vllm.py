"""A folder's greedy answers, and log-probs of one row, by vLLM: a request as JSON on standard input, results as JSON in
the file named last.

Runs in an environment that holds vLLM and not this package.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    folder, answers = sys.argv[1], Path(sys.argv[2])
    request = json.load(sys.stdin)
    model = LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=request["tokens"])
    found = model.chat(request["conversations"], settings, use_tqdm=False)
    rows = [
        {
            "prompt": list(row.prompt_token_ids),
            "tokens": list(row.outputs[0].token_ids),
            "text": row.outputs[0].text,
            "ended": row.outputs[0].finish_reason == "stop",
        }
        for row in found
    ]
    read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [row] = model.generate([{"prompt_token_ids": request["row"]}], read, use_tqdm=False)
    # The first token has none.
    picked = [place[token].logprob for place, token in zip(row.prompt_logprobs[1:], request["row"][1:], strict=True)]
    answers.write_text(json.dumps({"rows": rows, "logprobs": picked}))


if __name__ == "__main__":
    main()
