"""Where a run logs: ``metrics.csv`` in its folder, and Weights & Biases."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlhf_lit.errors import first_line, say
from rlhf_lit.files import plain, replace_file

INIT_TIMEOUT = 30.0  # seconds to wait for W&B before a run goes on without it


class _Rows(ExperimentWriter):
    """Continues a ``metrics.csv`` that is already there, where Lightning's writer deletes it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(fieldnames, lambda row: True)

    def rewind(self, step: int) -> None:
        """Forget the rows of steps that a resumed run is about to repeat, and one torn by a kill."""
        self.save()
        if Path(self.metrics_file_path).is_file():
            self._rewrite(self.metrics_keys, lambda row: (row["step"] or "").isdecimal() and int(row["step"]) < step)

    def _rewrite(self, fieldnames: list[str], keep: Callable[[dict[str, str]], bool]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if keep(row)]

        def write(file: Any) -> None:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)

        replace_file(path, write)


class MetricsFile(CSVLogger):
    """``metrics.csv`` in the run's folder: one row per logging step, flushed at once, continued when a run is resumed.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder).absolute()
        super().__init__(save_dir=path.parent, name="", version=path.name, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> _Rows:
        """The writer, made when first asked for."""
        if self._experiment is None:
            self._experiment = _Rows(log_dir=self.log_dir)
        assert isinstance(self._experiment, _Rows)
        return self._experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows from ``step`` on (0-based, as in the file)."""
        self.experiment.rewind(step)


class WandB(WandbLogger):
    """Weights & Biases, which a run outlives: without an API key, a network or a server it records offline.

    Args:
        project: W&B project.
        entity: W&B user or team.
        offline: record to the run's folder alone (``wandb sync`` uploads it later).
        name: display name (default: the run's, with its version).
        group: what W&B groups runs by.
        tags: W&B tags.
        id: W&B run id; a resumed run finds its own again.
    """

    def __init__(
        self,
        project: str = "rlhf_lit",
        entity: str | None = None,
        offline: bool = False,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(project=project, offline=offline, name=name, id=id, entity=entity, group=group, tags=tags)
        self._silenced = False

    def use_folder(self, folder: Path, name: str) -> None:
        """Keep W&B's files in the run's folder, and continue the W&B run that was begun there."""
        self._save_dir = self._wandb_init["dir"] = str(folder.absolute())
        if _has_agent():  # which names the run, and says which it is
            return
        self._wandb_init["name"] = self._name = self._name or name
        known = folder / "wandb_id.txt"
        if self._id is None and known.is_file():
            self._id = self._wandb_init["id"] = known.read_text(encoding="utf-8").strip()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; offline where W&B cannot be reached."""
        if self._experiment is None:
            import wandb

            if not self._offline and (reason := _no_wandb()):
                self._go_offline(reason)
            try:
                self._begin()
            except Exception as error:  # a run never dies of its logger, whatever W&B raises
                if self._offline:
                    raise
                wandb.teardown()
                self._go_offline(error)
                self._begin()
        return self._experiment

    def _begin(self) -> None:
        import wandb

        mode: Literal["offline"] | None = "offline" if self._offline else None
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=60)
        agents = ("project", "entity", "id") if _has_agent() else ()  # W&B would ignore ours, with a warning for each
        init = {key: value for key, value in self._wandb_init.items() if key not in agents}
        run = wandb.init(**init, mode=mode, settings=settings, reinit="finish_previous")
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        self._experiment = run
        if self._save_dir and Path(self._save_dir).is_dir() and not run.disabled:
            Path(self._save_dir, "wandb_id.txt").write_text(f"{run.id}\n", encoding="utf-8")

    def _go_offline(self, reason: object) -> None:
        self._offline = True
        say(f"warning: W&B is not reachable ({first_line(reason)}); recording offline, 'wandb sync' uploads it later")

    def _guard(self, action: Callable[[], None]) -> None:
        """Do it, or say once that W&B gave up and go on without."""
        if self._silenced:
            return
        try:
            action()
        except Exception as error:  # a run never dies of its logger
            self._silenced = True
            say(f"warning: W&B gave up ({first_line(error)}); the run goes on without it, metrics.csv has everything")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As Lightning's, without its exceptions."""
        self._guard(lambda: super(WandB, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """As Lightning's, without its exceptions."""
        self._guard(lambda: super(WandB, self).log_hyperparams(params))

    @rank_zero_only
    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """A table of sample completions, one row each."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(key)) for key in columns] for row in rows]
        self._guard(lambda: super(WandB, self).log_table("samples", columns=columns, data=data, step=step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the W&B run; a later use of this logger would continue it."""
        if self._experiment is not None:
            run = self._experiment
            self._wandb_init["id"] = self._id = run.id
            self._guard(lambda: run.finish(exit_code=0 if status == "success" else 1))
            self._experiment = None


def _has_agent() -> bool:
    """Whether this process is an arm of `wandb agent`'s."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _no_wandb() -> str | None:
    """Why no W&B server will take this run, where that can be told without asking one (which would prompt)."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return None  # the user chose offline or disabled by W&B's own means
    return None if wandb.setup().settings.api_key else "no API key: run 'wandb login', or set WANDB_API_KEY"


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=plain)
