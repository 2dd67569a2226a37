"""A real instruction-tuned model, aligned on a laptop. What has run is passed over. See README.md beside this."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.real_assistant.prepare import prepare
from experiments.real_assistant.results import write
from experiments.steps import Step, every

HERE = Path(__file__).parent
STAGES = ("before", "grpo", "ppo", "reward", "dpo", "ppo_reward")
TOKENS = 96  # of the longest answer that is evaluated
TEMPERATURE = 0.7  # of training too: at 1 the first token of an answer has an entropy of 3.6 nats
VADER = "rlhf_lit.rollout.sentiment.vader"


@dataclass(frozen=True)
class Settings:
    """What a YAML file of this folder says.

    Attributes:
        folder: of everything that is made.
        model: what is trained: a hub name or a folder.
        dtype: of the weights when answers are evaluated.
        seeds: of the runs. The evaluations have one: all models answer with the same random numbers.
        options: of every `fit`, after its configuration.
    """

    folder: str
    model: str
    dtype: str
    seeds: list[int]
    options: list[str]

    def rows(self, name: str) -> Path:
        """A file of rows."""
        return Path(self.folder, "rows", f"{name}.jsonl")

    def run(self, stage: str, seed: int) -> Path:
        """The folder of a run's versions."""
        return Path(self.folder, f"{stage}_{seed}")

    def evaluation(self, name: str) -> Path:
        """The folder of an evaluation."""
        return Path(self.folder, "evaluations", name)

    def fit(self, stage: str, seed: int, train: dict[str, float], *more: str) -> Step:
        """A stage's training on files of rows with their weights, which goes on where it was interrupted."""
        sources = [{"path": str(self.rows(name)), "weight": weight} for name, weight in train.items()]
        run = self.run(stage, seed)
        words = (
            "fit",
            f"--config={HERE.relative_to(HERE.parents[1])}/{stage}.yaml",
            f"--model.base.name={self.model}",
            f"--data.train={json.dumps(sources)}",
            f"--seed_everything={seed}",
            f"--runs={run.parent}",
            f"--name={run.name}",
            "--ckpt_path=last-or-none",
            *self.options,
            *more,
        )
        return Step(words, f"{run}/version_*/hf", run.with_suffix(".log"))

    def evaluate(self, name: str, model: str, *words: str) -> Step:
        """A model's evaluation."""
        to = self.evaluation(name)
        return Step(("evaluate", model, *words, f"--to={to}"), f"{to}/evaluation.json", to.with_suffix(".log"))

    def answers(self, name: str, model: str, rows: str, *judges: str) -> Step:
        """One answer to each held-out prompt, from the policy's own distribution, and its KL to the start."""
        reference = () if model == self.model else (f"--reference={self.model}",)
        return self.evaluate(
            name,
            model,
            *reference,
            f"--prompts.path={self.rows(rows)}",
            *judges,
            f"--sampling.max_new_tokens={TOKENS}",
            f"--sampling.temperature={TEMPERATURE}",
            f"--dtype={self.dtype}",
        )

    def instructions(self, name: str, model: str) -> Step:
        """Its answers to IFEval's prompts: all of a prompt's checks passed, and the share of them."""
        judges = ("--judge=InstructionReward", "--judge.credit=all", "--gold=InstructionReward")
        return self.answers(f"{name}_instructions", model, "ifeval_within_reach", *judges)

    def polite(self, name: str, model: str) -> Step:
        """Its answers to held-out prompts of the polite pairs: the reward model's score, and VADER's."""
        judges = (
            "--judge=RewardFromModel",
            f"--judge.path={self.run('reward', self.seeds[0])}",
            "--gold=RewardFromFunction",
            f"--gold.function={VADER}",
        )
        return self.answers(f"{name}_polite", model, "polite_held_out", *judges)

    def pairs(self, name: str, model: str, rows: str, *words: str) -> Step:
        """Accuracy on held-out pairs."""
        return self.evaluate(
            f"{name}_{rows}", model, f"--pairs.path={self.rows(rows)}", f"--dtype={self.dtype}", *words
        )

    def stages(self, names: Sequence[str]) -> list[list[Step]]:
        """Steps in the order in which they build on each other; those of one list do not."""
        found: list[list[Step]] = []
        if "before" in names:
            found.append([self.instructions("before", self.model)])
        for stage in ("grpo", "ppo"):
            if stage in names:
                found.append([self.fit(stage, seed, {"instructions": 1}) for seed in self.seeds])
                runs = [(f"{stage}_{seed}", str(self.run(stage, seed))) for seed in self.seeds]
                found.append([self.instructions(*one) for one in runs])
        if "reward" in names:
            found.append([self.fit("reward", self.seeds[0], {"polite_train": 2, "hh_train": 1})])
            judge = str(self.run("reward", self.seeds[0]))
            held_out = ("polite_held_out", "demo_held_out", "hh_held_out")
            found.append([self.pairs("reward", judge, rows) for rows in held_out])
            found.append([self.polite("before", self.model)])
        if "dpo" in names:
            found.append([self.fit("dpo", seed, {"polite_train": 1}) for seed in self.seeds])
            for seed in self.seeds:
                run = str(self.run("dpo", seed))
                pairs = self.pairs(f"dpo_{seed}", run, "polite_held_out", f"--reference={self.model}")
                found.append([self.polite(f"dpo_{seed}", run), pairs])
        return found

    def matched(self) -> list[list[Step]]:
        """PPO against the reward model, towards the KL that DPO's model of the same seed has."""
        found = []
        for seed in self.seeds:
            target = json.loads((self.evaluation(f"dpo_{seed}_polite") / "evaluation.json").read_text())["kl"]["exact"]
            reward = f"--model.reward.path={self.run('reward', self.seeds[0])}"
            kl = f"--model.kl.target={target['mean']:.3g}"
            found.append([self.fit("ppo_reward", seed, {"polite_train": 1}, reward, kl)])
            found.append([self.polite(f"ppo_reward_{seed}", str(self.run("ppo_reward", seed)))])
        return found


def main() -> None:
    """Run what has not run yet, and write the tables and the figure of all that has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--model", help="a folder with the model, in place of the settings' hub name")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the public files (data)")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="these alone (all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--to", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args()
    content: dict[str, Any] = yaml.safe_load(given.settings.read_text())
    settings = Settings(**content | ({"model": given.model} if given.model else {}))
    prepare(given.data, Path(settings.folder, "rows"))
    for steps in settings.stages(given.stage):
        every(steps, given.jobs)
    if "ppo_reward" in given.stage:
        for steps in settings.matched():
            every(steps, given.jobs)
    write(Path(settings.folder, "evaluations"), settings.seeds, given.to)


if __name__ == "__main__":
    main()
