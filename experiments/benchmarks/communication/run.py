"""What two processes hold for an optimizer step and send each other, against the formulas of docs/scaling.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
STEPS = 3
FRESH = ["--model.base.name=playground", "--model.base.fresh=true"]
PLAYGROUND = ["--data.train.path=playground",
              "--data.train.world.demonstrations=64", "--data.train.world.prompts=16", "--data.train.world.held_out=4",
              "--data.cache=null", "--data.batch_size=8", "--model.sampling.max_new_tokens=8"]  # fmt: skip
ALGORITHMS = {
    "SFT": ["--model=SFT", "--data=SFTDataModule"],
    "PPO": [
        "--model=PPO", "--data=RolloutDataModule", "--model.kl=FixedKL", "--model.kl.beta=0.1",
        "--model.critic.init=policy", "--model.reward=RewardFromFunction",
        "--model.reward.function=experiments.benchmarks.communication.run.constant", "--data.rollout_size=8",
    ],
}  # fmt: skip
WEIGHTS = {"all weights": [], "LoRA, rank 4": ["--model.base.lora.rank=4"]}


def constant(prompts: list[str], responses: list[str], rows: list[dict[str, str]]) -> list[float]:
    """A reward function; what it says does not matter here."""
    return [float(len(response)) for response in responses]


def count(options: list[str], strategy: str, folder: Path) -> tuple[int, int, int]:
    """Bytes of the trainable weights, what a rank holds, and the payload of the collectives of a step, the mean of all
    but the first."""
    file = folder / "bytes.json"
    words = ["fit", *options, f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.accelerator=cpu",
             f"--trainer.max_steps={STEPS}", "--trainer.enable_progress_bar=false", "--preflight=false",
             f"--runs={folder}/runs", "--trainer.limit_val_batches=0",
             "--trainer.callbacks=experiments.benchmarks.communication.counting.CommunicationBytes",
             f"--trainer.callbacks.file={file}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", "rlhf_lit", *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    found = json.loads(file.read_text())
    later = [sum(step.values()) for step in found["steps"][1:]]
    return found["trained"], found["held"], round(sum(later) / len(later))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="ddp", help="as trainer.strategy takes it")
    strategy = parser.parse_args().strategy
    place = Path(tempfile.mkdtemp(prefix="communication_"))
    count([*ALGORITHMS["SFT"], *FRESH, *PLAYGROUND], strategy, place)  # for its weights, on which the others stand
    base = f"--model.base.name={place}/runs/sft/version_0"
    print("| run | trainable weights, bytes | payload of a step, bytes | ratio | a rank holds, bytes |")
    print("|---|---|---|---|---|")
    for algorithm, options in ALGORITHMS.items():
        for weights, lora in WEIGHTS.items():
            trained, held, payload = count([*options[:2], base, *PLAYGROUND, *options[2:], *lora], strategy, place)
            print(f"| {algorithm}, {weights} | {trained} | {payload} | {payload / trained:.4f} | {held} |", flush=True)


if __name__ == "__main__":
    main()
