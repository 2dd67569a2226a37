"""Proxy reward models of growing size against the gold reward, by PPO and by best-of-n. See README.md beside this."""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.steps import Step, every
from rlhf_lit.report.figures import Figure
from rlhf_lit.report.reading import Run, read
from rlhf_lit.report.sections.overoptimisation import Trace, of_rollouts, picture, pooled
from rlhf_lit.report.statistics import Fit, Form, OverSeeds, fit

HERE = Path(__file__).parent
SMOOTHED = 5  # rollouts in a moving mean of the gold reward, whose noise would make a peak of its own
FALLEN = 0.1  # gold reward that must be lost; the means of 5 rollouts of 128 episodes differ by 0.04 from chance alone


@dataclass(frozen=True)
class Settings:
    """What a YAML file of this folder says; quickstart.yaml explains each."""

    folder: str
    pairs: str
    sizes: list[int]
    seeds: list[int]
    batch_size: int
    least_steps: int
    proxy: list[str]
    policy: list[str]
    best_of_n: list[str]

    def of(self, kind: str, size: int, seed: int) -> Path:
        """Where a proxy, a policy or an evaluation stands."""
        return Path(self.folder, f"{kind}_{size}_seed_{seed}")

    def shuffled(self, seed: int) -> Path:
        """The pairs in this seed's order."""
        file = Path(self.folder, f"pairs_{seed}.jsonl")
        rows = Path(self.pairs).read_text().splitlines(keepends=True)
        random.Random(seed).shuffle(rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows))
        return file

    def step(self, kind: str, size: int, seed: int, *words: str) -> Step:
        """A training run."""
        run = self.of(kind, size, seed)
        named = (f"--runs={self.folder}", f"--name={run.name}", f"--seed_everything={seed}")
        return Step(("fit", *words, *named), f"{run}/version_*/hf", run.with_suffix(".log"))

    def proxies(self) -> list[Step]:
        """The reward models. Few pairs make few steps, so the smallest pass over theirs more than twice."""
        files = {seed: self.shuffled(seed) for seed in self.seeds}
        return [
            self.step(
                "proxy",
                size,
                seed,
                *self.proxy,
                f"--data.train.path={files[seed]}",
                f"--data.train.limit={size}",
                f"--data.batch_size={self.batch_size}",
                f"--trainer.max_steps={max(self.least_steps, 2 * size // self.batch_size)}",
                "--trainer.max_epochs=-1",
            )
            for size in self.sizes
            for seed in self.seeds
        ]

    def policies(self) -> list[Step]:
        """PPO against each of them."""
        return [
            self.step(
                "ppo",
                size,
                seed,
                *self.policy,
                f"--model.reward.sources.proxy.path={self.of('proxy', size, seed)}",
            )
            for size in self.sizes
            for seed in self.seeds
        ]

    def choices(self) -> list[Step]:
        """Best-of-n by each of them, of the same samples of the starting policy."""
        steps = []
        for size in self.sizes:
            for seed in self.seeds:
                to = self.of("best_of_n", size, seed)
                judge = ("--judge=RewardFromModel", f"--judge.path={self.of('proxy', size, seed)}")
                words = ("evaluate", *self.best_of_n, *judge, f"--to={to}")
                steps.append(Step(words, f"{to}/evaluation.json", to.with_suffix(".log")))
        return steps


def main() -> None:
    """Train what has no run yet, and write the tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, default=HERE / "quickstart.yaml")
    parser.add_argument("--to", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    given = parser.parse_args()
    settings = Settings(**yaml.safe_load(given.settings.read_text()))
    for steps in (settings.proxies(), settings.policies(), settings.choices()):
        every(steps, given.jobs)
    rows = []
    drawn: dict[str, dict[int, list[Trace]]] = {"ppo": {}, "best_of_n": {}}
    for size in settings.sizes:
        for seed in settings.seeds:
            accuracy = newest(settings.of("proxy", size, seed)).last("val/accuracy")
            rollouts = of_rollouts(newest(settings.of("ppo", size, seed)))
            assert rollouts is not None
            chosen = best_of(settings.of("best_of_n", size, seed) / "evaluation.json")
            drawn["ppo"].setdefault(size, []).append(rollouts)
            drawn["best_of_n"].setdefault(size, []).append(chosen)
            rows.append({"pairs": size, "seed": seed, "proxy_accuracy": accuracy, **over_rollouts(rollouts)})
            rows[-1] |= {f"best_of_{2 ** (i + 1)}_gold": value for i, value in enumerate(chosen.gold)}
            rows[-1]["best_of_n_r2"] = law("best-of-n", chosen).r2
    given.to.mkdir(parents=True, exist_ok=True)
    with (given.to / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for name, traces in drawn.items():
        (given.to / f"{name}.png").write_bytes(draw(name, traces).png)
    print(table(rows, settings.sizes))


def newest(run: Path) -> Run:
    """The finished version of a run."""
    return read(max(path.parent for path in run.glob("version_*/hf")))


def best_of(file: Path) -> Trace:
    """Best-of-n above n = 1, from an evaluation."""
    first, *rest = sorted(json.loads(file.read_text())["best_of_n"], key=lambda point: point["n"])
    above = {which: np.array([p[which]["mean"] - first[which]["mean"] for p in rest]) for which in ("gold", "proxy")}
    return Trace("", np.sqrt([point["kl"] for point in rest]), above["gold"], above["proxy"])


def law(form: Form, trace: Trace) -> Fit:
    """Gao et al.'s, fitted to the gold reward."""
    found = fit(form, trace.d.tolist(), trace.gold.tolist())
    assert found is not None
    return found


def over_rollouts(trace: Trace) -> dict[str, Any]:
    """Where the gold reward stood highest, where it ended, and what the proxy did meanwhile: moving means.

    ``over_optimised`` is whether the gold reward fell by ``FALLEN`` from its peak to the end while the proxy rose.
    """
    assert trace.proxy is not None
    gold, proxy, kl = (
        np.convolve(c, np.ones(SMOOTHED) / SMOOTHED, "valid") for c in (trace.gold, trace.proxy, trace.d**2)
    )
    peak = int(gold.argmax())
    found = law("RL", trace)
    return {
        "gold_peak": float(gold[peak]),
        "kl_at_peak": float(kl[peak]),
        "gold_end": float(gold[-1]),
        "kl_end": float(kl[-1]),
        "proxy_at_peak": float(proxy[peak]),
        "proxy_end": float(proxy[-1]),
        "over_optimised": bool(gold[peak] - gold[-1] > FALLEN and proxy[-1] > proxy[peak]),
        "alpha": found.alpha.mean,
        "beta": found.beta.mean,
        "r2": found.r2,
    }


def draw(name: str, traces: dict[int, list[Trace]]) -> Figure:
    """Gold and proxy against √KL, a size a colour, pooled over seeds."""
    from matplotlib import colormaps

    form: Form = "RL" if name == "ppo" else "best-of-n"
    shades = colormaps["viridis"](np.linspace(0, 0.8, len(traces)))
    return picture(
        name,
        "",
        {f"{size} pairs": (pooled(found), shade) for (size, found), shade in zip(traces.items(), shades, strict=True)},
        {f"{size} pairs": [law(form, t) for t in found] for size, found in traces.items()},
    )


def table(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """The README's table: means over seeds with Student's 95 % intervals."""
    names = (
        "proxy_accuracy",
        "gold_peak",
        "kl_at_peak",
        "gold_end",
        "kl_end",
        "proxy_at_peak",
        "proxy_end",
        "best_of_64_gold",
    )
    names = tuple(name for name in names if name in rows[0])
    lines = ["| pairs | " + " | ".join(names) + " | over-optimised |", "|---" * (len(names) + 2) + "|"]
    for size in sizes:
        own = [row for row in rows if row["pairs"] == size]
        cells = []
        for name in names:
            found = OverSeeds.of([row[name] for row in own]).estimate
            cells.append(f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]")
        seeds = f"{sum(row['over_optimised'] for row in own)} of {len(own)} seeds"
        lines.append(f"| {size} | " + " | ".join(cells) + f" | {seeds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
