"""Sampling as TRL samples online, as a process of its own: `… trl_generate_peer WORKLOAD.json RESULT.json SETTING`.

One call of `model.generate` on the whole left-padded batch, the settings those of `GRPOTrainer` (TRL 1.16).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from experiments.benchmarks.throughput.workload import (
    LONGEST,
    STOP_TOKENS,
    Measured,
    Workload,
    peak_bytes,
    prompt_batches,
)


def main(workload: Workload, setting: str) -> Measured:
    """Answer the workload's prompts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=workload.dtype).to(workload.device).eval()
    stops, pad = torch.tensor(STOP_TOKENS, device=workload.device), 2
    settings = GenerationConfig(
        max_new_tokens=LONGEST,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(STOP_TOKENS),
        pad_token_id=pad,
    )
    seconds, amount = 0.0, 0
    for step, prompts in enumerate(prompt_batches(workload, setting)):
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=workload.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=workload.device)
        started = time.perf_counter()
        with torch.no_grad():
            output = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
        if workload.device == "cuda":
            torch.cuda.synchronize()
        if step >= workload.warm_up:
            seconds += time.perf_counter() - started
            ends = torch.isin(output, stops)
            lengths = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, output.shape[1])
            amount += int(lengths.sum())
    return Measured(seconds, amount, [], peak_bytes(workload.device))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(main(Workload.load(sys.argv[1]), sys.argv[3]))))
