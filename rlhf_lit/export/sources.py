"""The data that a run was trained on, by its own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lit.data.sources import is_local_file
from rlhf_lit.export.trained import Trained
from rlhf_lit.runs import PLAYGROUND


@dataclass(frozen=True)
class TrainingData:
    """A source of training rows.

    Attributes:
        path: as the configuration has it.
        details: what else it says, in words.
    """

    path: str
    details: tuple[str, ...]

    def __str__(self) -> str:
        # Where a file was on the machine of the run is nobody else's.
        name = self.path if on_the_hub(self.path) or ":" in self.path else Path(self.path).name
        return f"`{name}`" + (f" ({'; '.join(self.details)})" if self.details else "")


def training_data(found: Trained) -> list[TrainingData]:
    """The run's sources of training rows; none where there is no run, or a data module of another kind."""
    section: Any = found.sections.get("data") or {}
    train = section.get("init_args", {}).get("train") if isinstance(section, dict) else None
    sources = train if isinstance(train, list) else [train]
    return [_source(source) for source in sources if isinstance(source, dict) and source.get("path")]


def _source(settings: dict[str, Any]) -> TrainingData:
    details = [f"{key} {settings[key]}" for key in ("name", "split", "limit") if settings.get(key) is not None]
    if columns := settings.get("columns"):
        details.append("columns " + ", ".join(f"{ours} from {theirs}" for ours, theirs in columns.items()))
    if settings.get("weight", 1.0) != 1.0:
        details.append(f"weight {settings['weight']:g}")
    return TrainingData(str(settings["path"]), tuple(details))


def on_the_hub(path: str) -> bool:
    """Whether a source is a data set's name on the hub."""
    special = path == PLAYGROUND or ":" in path or path.startswith((".", "/", "~"))
    return not special and path.count("/") <= 1 and not is_local_file(path) and not Path(path).exists()
