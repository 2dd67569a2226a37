"""``quickstart``: all of RLHF in the built-in world, through the same command line and configs a user has, and a
scoreboard of what each stage achieved."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lit import playground
from rlhf_lit.commands import playground as pairs
from rlhf_lit.commands import training
from rlhf_lit.commands.shipped import folder
from rlhf_lit.commands.training import Parser
from rlhf_lit.errors import printable, tell
from rlhf_lit.models.base import Base

if TYPE_CHECKING:
    from rlhf_lit.evaluation.scoreboard import Row

FOLDER = Path("runs/quickstart")
LABELS = {
    "base": "base (untrained)",
    "sft": "SFT",
    "sft_best_of_4": "best-of-4 of SFT",
    "ppo": "PPO",
    "dpo": "DPO",
}
SHOWN = 6
# Which rows of a stage are the built-in world's; the other stages learn from pairs in a file.
WORLDLY = {"sft": ("train",), "ppo": ("train", "validation")}


def run(overlays: list[str] | None = None, world: playground.World = playground.World()) -> Path:
    """SFT → pairs → reward model → PPO, and DPO; then the scoreboard.

    Writes ``runs/quickstart/`` in the current folder.

    Args:
        overlays: configs laid over all four stages.
        world: the built-in world; what differs from the default reaches every stage.

    Returns:
        The scoreboard's JSON file.
    """
    started, configs = time.perf_counter(), folder("configs")
    extra = [f"--config={overlay}" for overlay in overlays or []]
    default = playground.World()
    changed = {name: value for name, value in asdict(world).items() if value != getattr(default, name)}

    def fit(algorithm: str) -> None:
        tell(f"\n── {algorithm} ──")
        worlds = [option for rows in WORLDLY.get(algorithm, ()) for option in _options(f"data.{rows}.world", changed)]
        training.main(["fit", f"--config={configs / algorithm / 'quickstart.yaml'}", *extra, *worlds])

    fit("sft")
    for split, file in (("train", "pairs.jsonl"), ("held_out", "pairs_held_out.jsonl")):
        options = ["--model", str(FOLDER / "sft"), "--to", str(FOLDER / file), "--split", split]
        pairs.main([*options, *_options("world", changed)])
    fit("reward")
    fit("ppo")
    fit("dpo")
    tell("\n── scoreboard ──")
    return evaluate(started, world)


def _options(prefix: str, values: dict[str, object]) -> list[str]:
    return [f"--{prefix}.{name}={value}" for name, value in values.items()]


def evaluate(started: float, world: playground.World) -> Path:
    """Score the four stages on every held-out prompt; print, draw and save."""
    from rlhf_lit.evaluation.scoreboard import as_json, picture, scoreboard

    held_out = list(dict.fromkeys(row["prompt"] for row in playground.prompts(world, "held_out")))
    policies = {
        "base": Base(name="playground", fresh=True),
        **{name: Base(name=str(FOLDER / name)) for name in ("sft", "ppo", "dpo")},
    }
    rows, responses = scoreboard(policies, str(FOLDER / "sft"), str(FOLDER / "reward"), held_out)
    rows = {name: rows[name] for name in LABELS}
    accuracy, count = reward_accuracy()
    margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / count)
    file = FOLDER / "scoreboard.json"
    seconds = time.perf_counter() - started
    report = {
        "models": as_json(rows),
        "reward_model": {
            "accuracy": accuracy,
            "low": accuracy - margin,
            "high": accuracy + margin,
            "pairs": count,
        },
        "prompts": len(held_out),
        "seconds": seconds,
    }
    file.write_text(json.dumps(report, indent=2) + "\n")
    picture(rows, LABELS, FOLDER / "scoreboard.png")
    _print(rows, responses, held_out)
    tell(f"reward model: {accuracy:.3f} ± {margin:.3f} right on {count} held-out pairs (labels are noisy)")
    tell(f"{seconds:.0f} s in all · {file} · {FOLDER / 'scoreboard.png'}")
    return file


def reward_accuracy() -> tuple[float, int]:
    """The reward model's accuracy on pairs of held-out prompts, and how many there are."""
    from lightning import Trainer

    from rlhf_lit.algorithms.reward_model import RewardModel
    from rlhf_lit.data.modules import PreferenceDataModule
    from rlhf_lit.data.records import Source

    held_out = str(FOLDER / "pairs_held_out.jsonl")
    data = PreferenceDataModule(validation=Source(held_out), max_length=96, micro_batch_tokens=32768)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    module = RewardModel(Base(name=str(FOLDER / "reward")))
    metrics = trainer.validate(module, data, verbose=False)[0]
    return float(metrics["val/accuracy"]), len(data.examples["validation"])


def _print(rows: dict[str, Row], responses: dict[str, list[str]], prompts: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 110)  # a log has no width of its own
    table = Table(title=f"{len(prompts)} held-out prompts, mean [95 % interval]")
    for column in ("", "gold reward", "win rate vs SFT", "KL to SFT", "length"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        cells = [f"{e.mean:.2f} [{e.low:.2f}, {e.high:.2f}]" for e in (row.gold_reward, row.win_rate, row.kl)]
        table.add_row(LABELS[name], *cells, f"{row.length.mean:.1f} [{row.length.low:.1f}, {row.length.high:.1f}]")
    console.print(table)
    samples = Table(title="side by side")
    samples.add_column("prompt")
    for name in ("sft", "ppo", "dpo"):
        samples.add_column(LABELS[name])
    for i in range(0, len(prompts), max(1, len(prompts) // SHOWN)):
        texts = [prompts[i], *(responses[name][i] for name in ("sft", "ppo", "dpo"))]
        samples.add_row(*(Text(printable(text)) for text in texts))
    console.print(samples)


def main(argv: list[str]) -> int:
    """Run ``quickstart``."""
    parser = Parser(prog="rlhf-lit quickstart", description="The whole pipeline in the built-in world.")
    parser.add_argument(
        "--overlays", type=str, nargs="+", default=[], metavar="FILE", help="Configs laid over all four stages."
    )
    parser.add_class_arguments(playground.World, "world")
    arguments = parser.instantiate_classes(parser.parse_args(argv))
    training.quiet_libraries()
    run(arguments.overlays, arguments.world)
    return 0
