"""What the arms answer to the same prompts."""

from __future__ import annotations

from typing import Any

from rlhf_lit.report.comparing import Arm
from rlhf_lit.report.content import Completions, Response, Section, number
from rlhf_lit.report.study import Study

SHOWN = 8


def completions(study: Study) -> Section:
    """Side by side, of the first seed of each arm."""
    section = Section("completions", "Completions side by side")
    answers, source = _of_evaluations(study)
    if not answers:
        answers, source = _of_runs(study)
    common = [prompt for prompt in next(iter(answers.values()), {}) if all(prompt in rows for rows in answers.values())]
    if not common:
        section.missing.append(
            "a prompt that all arms have answered: runs write samples.jsonl after each validation, and rlhf-lit "
            "report … --evaluate lets them answer the same prompts."
        )
        return section
    section.text.append(source)
    for prompt in common[:: max(1, len(common) // SHOWN)][:SHOWN]:
        section.completions.append(Completions(prompt, [rows[prompt] for rows in answers.values()]))
    return section


def _of_evaluations(study: Study) -> tuple[dict[str, dict[str, Response]], str]:
    """By arm, then by prompt."""
    found: dict[str, dict[str, Response]] = {}
    for arm in study.arms:
        run = next((run for run in arm.runs if run.folder in study.evaluations), None)
        if run is None:
            continue
        one = study.evaluations[run.folder]
        found[arm.label] = {}
        for line in one.lines:
            if line["sample"] == 0 and "model" in line:
                scores = [f"{judge} {number(float(line[f'model/{judge}']))}" for judge in one.scoring]
                notes = [_seed(run.seed), *scores, f"{line['model/tokens']} tokens"]
                found[arm.label][line["prompt"]] = Response(arm.label, line["model"], " · ".join(notes))
    return found, "From the evaluations' samples.jsonl: the first sample of the first seed of each arm."


def _of_runs(study: Study) -> tuple[dict[str, dict[str, Response]], str]:
    found = {arm.label: rows for arm in study.arms if (rows := _last(arm))}
    return found, "From the runs' samples.jsonl: what the first seed of each arm answered after its last step."


def _last(arm: Arm) -> dict[str, Response]:
    run = next((run for run in arm.runs if run.samples), None)
    if run is None:
        return {}
    step = run.samples[-1].get("step")
    found: dict[str, Response] = {}
    for row in run.samples:
        if row.get("step") == step and "response" in row:
            notes = [_seed(run.seed), f"step {step}", *_notes(row)]
            found.setdefault(str(row.get("prompt")), Response(arm.label, str(row["response"]), " · ".join(notes)))
    return found


def _notes(row: dict[str, Any]) -> list[str]:
    notes = [f"score {number(float(row['score']))}"] if "score" in row else []
    notes += [f"{row['tokens']} tokens"] if "tokens" in row else []
    return notes + (["not ended"] if row.get("ended") is False else [])


def _seed(seed: int | None) -> str:
    return "no seed" if seed is None else f"seed {seed}"
