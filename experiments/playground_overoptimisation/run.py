"""PPO arms in the built-in world: KL coefficient and learning rate against gold reward. See README.md beside this."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rlhf_lit import cli
from rlhf_lit.data import playground
from rlhf_lit.evaluation.scoreboard import scoreboard
from rlhf_lit.models.loading import Base

FOLDER = Path("runs/quickstart")
# (β, learning rate)
ARMS = ((0.05, 3e-4), (0.15, 3e-4), (0.3, 3e-4), (1.0, 3e-4), (0.05, 1e-4), (0.3, 1e-4))


def main() -> None:
    """Train the arms that have no run yet, then score all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    names = {}
    for beta, rate in ARMS:
        name = f"overoptimisation/beta_{beta}_lr_{rate}_seed_{seed}"
        names[name] = Base(name=f"runs/{name}")
        if not list(Path(f"runs/{name}").glob("version_*/hf")):
            cli.main(
                [
                    "fit",
                    "--config=configs/ppo/quickstart.yaml",
                    f"--name={name}",
                    f"--seed_everything={seed}",
                    f"--model.kl.beta={beta}",
                    f"--model.learning_rate={rate}",
                ]
            )
    held_out = [row["prompt"] for row in playground.prompts(playground.World(), "held_out")]
    policies = {"sft": Base(name=str(FOLDER / "sft")), **names}
    rows, _ = scoreboard(policies, str(FOLDER / "sft"), str(FOLDER / "reward"), held_out)
    for name, row in rows.items():
        gold, kl = row.gold_reward, row.kl
        print(
            f"{name:50} gold {gold.mean:.2f} [{gold.low:.2f}, {gold.high:.2f}]  KL {kl.mean:.2f}  {row.length.mean:.1f}"
        )
    Path("runs/overoptimisation/results.json").write_text(json.dumps({k: asdict(v) for k, v in rows.items()}, indent=1))


if __name__ == "__main__":
    main()
