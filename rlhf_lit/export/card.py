"""The model card of an export, from the run's own files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rlhf_lit.export.comparison import Difference
from rlhf_lit.export.sources import on_the_hub, training_data
from rlhf_lit.export.trained import Trained
from rlhf_lit.export.usage import usage
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_tokenizer
from rlhf_lit.trainer.callbacks import environment


def model_card(
    found: Trained, holds: str, folder: Path, repository: str | None, difference: Difference, ollama: str | None = None
) -> str:
    """The text of ``README.md``; says what the run's files say, and leaves out what they do not.

    Args:
        found: what was exported.
        holds: the same, in words.
        folder: the export, with its weights and its tokenizer.
        repository: its name on the hub, if it goes there.
        difference: to the model as it was trained.
        ollama: what the folder has for it, in words.
    """
    from huggingface_hub import ModelCardData

    whole = not (folder / "adapter_config.json").is_file()
    algorithm = str(found.config.get("class_path", "")).rsplit(".", 1)[-1]
    named = found.base_name or found.config.get("init_args", {}).get("base", {}).get("name")
    # The hub takes no folder for a base, and a whole model's may be one that is not here.
    hub_base = found.base_name if found.base_name is not None and not Path(found.base_name).exists() else None
    sources = training_data(found)
    data = ModelCardData(
        base_model=hub_base,
        base_model_relation="adapter" if hub_base and not whole else "finetune" if hub_base else None,
        datasets=list(dict.fromkeys(source.path for source in sources if on_the_hub(source.path))) or None,
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
    facts += [f"- trained on: {source}" for source in sources]
    if found.scorer:
        facts.append("- a score is the one label's logit plus `bias` of `reward.json`; pad with its `pad_token_id`")
    else:
        facts.append(f"- {_stops(folder, found.trust_remote_code)}")
    if ollama:
        facts.append(f"- {ollama}")
    facts += [
        f"- {difference}",
        "- license: not stated here; that of the base and of the data holds",
    ]
    title = repository or (found.run or found.folder).name
    sections = [f"# {title}", "\n".join(facts)]
    sections.append(f"## Use\n\n```python\n{usage(found, folder, whole, repository)}```")
    if measured := _last_measured(found.run):
        where, metrics = measured
        lines = [f"| {name} | {value} |" for name, value in metrics.items()]
        sections.append("\n".join([f"## Last measured: {where}", "", "| metric | value |", "|---|---|", *lines]))
    if found.config_file is not None:
        sections.append(f"## Configuration\n\n```yaml\n{found.config_file.read_text(encoding='utf-8').rstrip()}\n```")
    sections.append(_versions(found))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _stops(folder: Path, trust_remote_code: bool) -> str:
    """Which tokens end an answer, and what opens one."""
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(Base(str(folder), trust_remote_code=trust_remote_code))
    found = GenerationConfig.from_pretrained(folder).eos_token_id
    stops = found if isinstance(found, list) else [found]
    names = ", ".join(
        f"`{name}` ({stop})" for name, stop in zip(tokenizer.convert_ids_to_tokens(stops), stops, strict=True)
    )
    return f"answers end with {names}; the chat template is the tokenizer's (`chat_template.jinja`)"


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
