"""The model card of an export, from the run's own files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rlhf_lit.export.comparison import Difference
from rlhf_lit.export.trained import Trained
from rlhf_lit.trainer.callbacks import environment


def model_card(found: Trained, title: str, holds: str, whole: bool, difference: Difference) -> str:
    """The text of ``README.md``; says what the run's files say, and leaves out what they do not."""
    from huggingface_hub import ModelCardData

    algorithm = str(found.config.get("class_path", "")).rsplit(".", 1)[-1]
    named = found.base_name or found.config.get("init_args", {}).get("base", {}).get("name")
    data = ModelCardData(
        # The hub takes no folder for a base, and a whole model's may be one that is not here.
        base_model=None if found.base_name is None or Path(found.base_name).exists() else found.base_name,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-classification" if found.scorer else "text-generation",
        tags=["rlhf_lit", *([algorithm.lower()] if algorithm else [])],
    )
    facts = [f"- holds: {holds}"]
    if algorithm:
        facts.append(f"- algorithm: {algorithm} (rlhf_lit)")
    if named:
        facts.append(f"- base: `{named}`")
    if found.quantized and found.foundation and found.foundation.quantization:
        how = ", ".join(f"{key} {value}" for key, value in found.foundation.quantization.items())
        facts.append(f"- the base was in 4 bits in training: {how}")
    if found.scorer:
        facts.append("- a score is the one label's logit plus `bias` of `reward.json`; pad with its `pad_token_id`")
    facts.append(f"- {difference}")
    sections = [f"# {title}", "\n".join(facts)]
    if measured := _last_measured(found.run):
        where, metrics = measured
        lines = [f"| {name} | {value} |" for name, value in metrics.items()]
        sections.append("\n".join([f"## Last measured: {where}", "", "| metric | value |", "|---|---|", *lines]))
    if found.config_file is not None:
        sections.append(f"## Configuration\n\n```yaml\n{found.config_file.read_text(encoding='utf-8').rstrip()}\n```")
    sections.append(_versions(found))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _last_measured(run: Path | None) -> tuple[str, dict[str, str]] | None:
    """The last validation in ``metrics.csv``, else its last step: where it was, and its numbers as they stand there."""
    file = run / "metrics.csv" if run else None
    if file is None or not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines)]
    for prefix, words in (("val/", "validation"), ("", "training")):
        for row in reversed(rows):
            metrics = {n: value for n, value in row.items() if n.startswith(prefix) and n not in ("step", "epoch")}
            if metrics:
                return f"{words} at step {row['step']} of `metrics.csv`, which counts from 0", metrics
    return None


def _versions(found: Trained) -> str:
    """Library versions: of the run as it recorded them, and of this export."""
    columns = {"exported with": environment()["packages"]}
    if found.config_file is not None:
        record = found.config_file.with_name(found.config_file.stem.replace("config", "versions") + ".json")
        if record.is_file():
            columns = {"trained with": json.loads(record.read_text())["packages"], **columns}
    names = dict.fromkeys(name for packages in columns.values() for name in packages)
    lines = [f"| {name} | {' | '.join(str(c.get(name) or '–') for c in columns.values())} |" for name in names]
    header = [f"| package | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join(["## Versions", "", *header, *lines])
