"""What an evaluation found: as JSON, as a table on the terminal, as a picture, and its samples line by line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lit.data.records import RowReport
from rlhf_lit.errors import printable
from rlhf_lit.evaluation.best_of_n import Point
from rlhf_lit.evaluation.estimates import LEVEL, RESAMPLES, Estimate
from rlhf_lit.evaluation.pairs import PairReport
from rlhf_lit.evaluation.win_rate import HeadToHead

if TYPE_CHECKING:
    from rich.text import Text

SHOWN = 6
INTERVALS = f"{LEVEL:.0%}, percentile bootstrap over prompts, {RESAMPLES} resamples (of shares of pairs: Wilson's)"


@dataclass(frozen=True)
class Responses:
    """A model's responses in numbers, means over prompts.

    Attributes:
        length: tokens, EOS included.
        ended: share that closed themselves; None for those of a file.
        scores: by the name of the judge, `judge` or `gold`.
    """

    length: Estimate
    ended: Estimate | None
    scores: dict[str, Estimate]


@dataclass(frozen=True)
class Divergence:
    """KL(π‖π₀), nats per response.

    Attributes:
        exact: Σ_t of the exact KL of the sampled prefixes.
        k1: Σ_t (log π − log π₀)(y_t) of the same samples.
    """

    exact: Estimate
    k1: Estimate


@dataclass(frozen=True)
class Evaluation:
    """All that was asked for; what was not is empty or None.

    Attributes:
        model, baseline, reference: where they are, by their whole address.
        judges: `judge` and `gold`, in words.
        settings: seed, sampling and the like.
        files: what became of the rows of each file.
        responses: by `model` and `baseline`.
        win_rates: against the baseline, by the name of the judge.
        best_of_n: by the judge, the gold judge beside it.
        kl: to the reference.
        pairs: accuracy on the pair file.
        samples: for ``samples.jsonl``.
    """

    model: str
    baseline: str | None
    reference: str | None
    judges: dict[str, str]
    settings: dict[str, Any]
    files: dict[str, RowReport] = field(default_factory=dict)
    responses: dict[str, Responses] = field(default_factory=dict)
    win_rates: dict[str, HeadToHead] = field(default_factory=dict)
    best_of_n: list[Point] = field(default_factory=list)
    kl: Divergence | None = None
    pairs: PairReport | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)


def plain(value: Any) -> Any:
    """Dataclasses as JSON, the samples left out; NaN, which JSON has not, as null; sets as sorted lists."""
    if isinstance(value, Estimate):
        return value.plain
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name != "samples"}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a plain structure under a name with slashes, as loggers take them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}/{key}".lstrip("/"))
    elif isinstance(value, list):
        for item in value:
            yield from flat(item, f"{name}/{item['n']}" if isinstance(item, dict) and "n" in item else name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def lines(found: Evaluation) -> list[tuple[str, str]]:
    """The table: what, and how much."""
    rows: list[tuple[str, str]] = []
    for name, responses in found.responses.items():
        rows += [(f"{name}: {judge} score", str(score)) for judge, score in responses.scores.items()]
        rows.append((f"{name}: length (tokens)", str(responses.length)))
        if responses.ended is not None:
            rows.append((f"{name}: ended by itself", str(responses.ended)))
    for judge, rate in found.win_rates.items():
        rows += [
            (f"win rate by {judge}, ties ½", str(rate.win_rate)),
            ("  win · tie · loss", f"{rate.win.mean:.3f} · {rate.tie.mean:.3f} · {rate.loss.mean:.3f}"),
            (f"  at similar length ({rate.similar.mean:.0%} of them)", str(rate.similar_win_rate)),
            ("  correlation with length", str(rate.length_correlation)),
        ]
    if found.kl is not None:
        rows += [("KL to reference (nats)", str(found.kl.exact)), ("  by k1", str(found.kl.k1))]
    for point in found.best_of_n:
        rows.append((f"best of {point.n}: judge score (KL ≤ {point.kl:.3f})", str(point.proxy)))
        if point.gold is not None:
            rows.append((f"best of {point.n}: gold score", str(point.gold)))
    if found.pairs is not None:
        report = found.pairs
        rows.append(
            (f"pairs right of {report.overall.count} ({report.overall.ties} ties)", str(report.overall.accuracy))
        )
        rows += [(f"  {name} ({part.count})", str(part.accuracy)) for name, part in report.subsets.items()]
        rows += [(f"section {name}", str(section)) for name, section in report.sections.items()]
        if report.score is not None:
            rows.append(("RewardBench score", str(report.score)))
        rows.append(("  the longer is the better", str(report.longer.accuracy)))
    return rows


def show(found: Evaluation, wide: bool) -> None:
    """The table, and a few samples side by side.

    Args:
        found: what to show.
        wide: use the terminal's own width; a file has none.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if wide else 110, highlight=False)
    table = Table(title="mean [95 % interval]", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in lines(found):
        table.add_row(_cell(name), _cell(value))
    console.print(table)
    first = [row for row in found.samples if row["sample"] == 0]
    if not first:
        return
    side_by_side = Table(title="side by side")
    names = ["prompt", *found.responses]
    for name in names:
        side_by_side.add_column(_cell(name))
    for row in first[:: max(1, len(first) // SHOWN)][:SHOWN]:
        side_by_side.add_row(*(_cell(row.get(name)) for name in names))
    console.print(side_by_side)


def _cell(text: str | None) -> Text:
    """As it stands: no markup of rich's, and nothing that acts on a terminal."""
    from rich.text import Text

    return Text(printable(text or ""))


def picture(found: Evaluation, file: Path) -> bool:
    """Win rates, the best-of-n curve and accuracies, as far as they are there, as a PNG. → whether there was any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = {f"win rate by {name}": rate.win_rate for name, rate in found.win_rates.items()}
    rates |= {f"at similar length, by {name}": rate.similar_win_rate for name, rate in found.win_rates.items()}
    accuracies: dict[str, Estimate] = {}
    if found.pairs is not None:
        accuracies = {"all pairs": found.pairs.overall.accuracy}
        accuracies |= found.pairs.sections or {name: part.accuracy for name, part in found.pairs.subsets.items()}
    panels = [bool(rates), bool(found.best_of_n), bool(accuracies)]
    if not any(panels):
        return False
    figure, axes = plt.subplots(1, sum(panels), figsize=(5.5 * sum(panels), 4), layout="constrained", squeeze=False)
    places = iter(axes[0])
    for estimates, label in ((rates, "ties ½"), (None, ""), (accuracies, "accuracy")):
        if estimates is None and found.best_of_n:
            _curve(next(places), found)
        elif estimates:
            _bars(next(places), estimates, label)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return True


def _bars(axes: Any, estimates: dict[str, Estimate], label: str) -> None:
    for i, estimate in enumerate(estimates.values()):
        axes.barh(i, estimate.mean, xerr=_errors([estimate]), color=f"C{i}", capsize=3)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.invert_yaxis()
    axes.axvline(0.5, color="0.4", linewidth=1, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)


def _curve(axes: Any, found: Evaluation) -> None:
    kl = [point.kl for point in found.best_of_n]
    curves = {"best of n: judge": [point.proxy for point in found.best_of_n]}
    if all(point.gold is not None for point in found.best_of_n):
        curves["best of n: gold"] = [point.gold for point in found.best_of_n if point.gold is not None]
    for i, (name, estimates) in enumerate(curves.items()):
        means = [estimate.mean for estimate in estimates]
        axes.errorbar(kl, means, yerr=_errors(estimates), marker="o", color=f"C{i}", label=name, capsize=3)
    for point in found.best_of_n:
        axes.annotate(str(point.n), (point.kl, point.proxy.mean), textcoords="offset points", xytext=(4, 4))
    axes.set_xlabel("log n − (n−1)/n (nats)")
    axes.set_ylabel("score")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _errors(estimates: list[Estimate]) -> list[list[float]]:
    """Bars of intervals, as matplotlib takes them; of a skewed bootstrap the estimate may lie outside."""
    return [[max(0.0, e.mean - e.low) for e in estimates], [max(0.0, e.high - e.mean) for e in estimates]]
