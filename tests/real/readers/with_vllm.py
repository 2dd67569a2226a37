"""A folder's greedy answers, by vLLM: conversations as JSON on standard input, answers as JSON in the file named last.

Runs in an environment that holds vLLM and not this package.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    folder, tokens, answers = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    model = LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True)
    found = model.chat(json.load(sys.stdin), SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    rows = [
        {
            "prompt": list(row.prompt_token_ids),
            "tokens": list(row.outputs[0].token_ids),
            "text": row.outputs[0].text,
            "ended": row.outputs[0].finish_reason == "stop",
        }
        for row in found
    ]
    answers.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
