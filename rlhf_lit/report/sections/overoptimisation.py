"""Over-optimisation: the proxy reward and the gold one against √KL, with the law of Gao et al."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_lit.evaluation.estimates import Array
from rlhf_lit.report.content import Cell, Section, Table, interval, number, plain, seeds_note
from rlhf_lit.report.figures import CATEGORIES, FAINT, Figure, canvas, finish, legend
from rlhf_lit.report.reading import Run
from rlhf_lit.report.statistics import Fit, Form, OverSeeds, fit
from rlhf_lit.report.study import Study

D = "√KL to the starting policy (√nats)"
BINS = 12
AT_START = 1e-3  # nats: a first rollout is the starting policy's
LAWS: dict[Form, str] = {"RL": "R = d(α − β·log d)", "best-of-n": "R = d(α − βd)"}


@dataclass(frozen=True)
class Trace:
    """Rewards of one run, or of one cloud of runs, above the starting policy's.

    Attributes:
        label: whose.
        d: √KL.
        gold: as many.
        proxy: as many; None where it is not known.
    """

    label: str
    d: Array
    gold: Array
    proxy: Array | None


def over_optimisation(study: Study) -> Section:
    """Over the rollouts of runs, over arms, and of best-of-n: each where there is a gold reward."""
    section = Section("overoptimisation", "Over-optimisation")
    rows: list[list[Cell]] = []
    rollouts = {
        arm.label: traces for arm in study.arms if (traces := [t for run in arm.runs if (t := of_rollouts(run))])
    }
    if rollouts:
        caption = (
            "Over rollouts: the reward that was optimised and a source of weight 0 beside it (objective/scores, "
            "objective/scores/<source>) against objective/kl_exact, both above the first rollout's. Points: means of a "
            f"{BINS}th of an arm's rollouts, by KL. Fits: to every rollout of a seed, then over seeds."
        )
        drawn = {label: (pooled(traces), colour(study, label)) for label, traces in rollouts.items()}
        fits = {label: [fit("RL", t.d.tolist(), t.gold.tolist()) for t in traces] for label, traces in rollouts.items()}
        section.figures.append(picture("overoptimisation_rollouts", caption, drawn, fits))
        rows += _rows("RL", fits)
    clouds = [
        cloud for algorithm in dict.fromkeys(a.algorithm for a in study.arms) if (cloud := of_arms(study, algorithm))
    ]
    if clouds:
        caption = (
            "Over arms: every run's evaluation is a point, above the reference's own. One fit for each algorithm; its "
            "intervals are those of the regression, over runs."
        )
        drawn = {t.label: (t, CATEGORIES[i % len(CATEGORIES)]) for i, t in enumerate(clouds)}
        fits = {t.label: [fit("RL", t.d.tolist(), t.gold.tolist())] for t in clouds}
        section.figures.append(picture("overoptimisation_arms", caption, drawn, fits, joined=False))
        rows += [_regression(label, one) for label, (one,) in fits.items() if one is not None]
    best = {
        arm.label: traces for arm in study.arms if (traces := [t for run in arm.runs if (t := of_best(study, run))])
    }
    if best:
        caption = "Best-of-n: the evaluations' best_of_n, above n = 1, against √(log n − (n−1)/n)."
        drawn = {label: (pooled(traces), colour(study, label)) for label, traces in best.items()}
        fits = {
            label: [fit("best-of-n", t.d.tolist(), t.gold.tolist()) for t in traces] for label, traces in best.items()
        }
        section.figures.append(picture("overoptimisation_best_of_n", caption, drawn, fits))
        rows += _rows("best-of-n", fits)
    if not section.figures:
        section.missing.append(
            "a gold reward beside the one that was optimised: train on a RewardSum that has it with weight 0 "
            "(docs/rewards.md), or rlhf-lit report … --evaluate with --judge (the proxy) and --gold."
        )
        return section
    section.text.append(
        "d = √KL. Gao et al. 2022 (arXiv 2210.10760): best-of-n R = d(α − βd), RL R = d(α − β·log d), by least "
        "squares; R² = 1 − Σ residual²/Σ (R − mean)². A gold reward that falls while the proxy rises is "
        "over-optimisation. The law was found for learned proxies of one gold model; where R² is low it does not "
        "describe these runs."
    )
    if rows:
        head = ["whose gold reward", "law", "α", "β", "R²", "points", "KL of the fit's peak"]
        section.tables.append(Table("Fits to the gold reward", head, rows))
    else:
        section.text.append("No fit: each needs three points or more that are not the start.")
    return section


def of_rollouts(run: Run) -> Trace | None:
    """A run's rollouts, where its reward has a source that was only watched."""
    gold = watched(run)
    names = ("objective/kl_exact", "objective/scores", f"objective/scores/{gold}")
    if gold is None or any(name not in run.metrics for name in names):
        return None
    kl, proxy, truth = (run.metrics[name].values for name in names)
    if not len(kl) == len(proxy) == len(truth) or kl[0] > AT_START:
        return None
    # A rollout's numbers stand beside every optimizer step that is made on it: once is what was measured.
    new = np.concatenate([[True], (np.diff(kl) != 0) | (np.diff(proxy) != 0) | (np.diff(truth) != 0)])
    kl, proxy, truth = kl[new], proxy[new], truth[new]
    return Trace("", np.sqrt(np.maximum(kl[1:], 0)), truth[1:] - truth[0], proxy[1:] - proxy[0])


def watched(run: Run) -> str | None:
    """The source of a `RewardSum` that has weight 0: `gold` where one is named so, else the first."""
    reward = run.model.get("reward") if run.kind.on_policy else None
    weights = ((reward or {}).get("init_args") or {}).get("weights") or {}
    names = [name for name, weight in weights.items() if weight == 0]
    return "gold" if "gold" in names else next(iter(names), None)


def of_arms(study: Study, algorithm: str) -> Trace | None:
    """The evaluations of an algorithm's runs, where they know the reference's own reward by a gold judge."""
    found = []
    for run in study.runs:
        one = study.evaluations.get(run.folder)
        start = one.starts_at if one and run.algorithm == algorithm else None
        if one is None or start is None or "gold" not in start or not one.kl or not one.kl["mean"]:
            continue
        proxy = float(one.table("judge").mean()) - start["judge"] if "judge" in start else np.nan
        found.append((one.kl["mean"] ** 0.5, float(one.table("gold").mean()) - start["gold"], proxy))
    if len(found) < 3:
        return None
    d, gold, proxies = np.array(sorted(found)).T
    return Trace(algorithm, d, gold, proxies if np.isfinite(proxies).all() else None)


def of_best(study: Study, run: Run) -> Trace | None:
    """A run's best-of-n by a proxy, with gold."""
    one = study.evaluations.get(run.folder)
    points = sorted(one.numbers["best_of_n"], key=lambda point: point["n"]) if one else []
    if len(points) < 3 or points[0]["n"] != 1 or any(point["gold"] is None for point in points):
        return None
    start, rest = points[0], points[1:]
    return Trace(
        "",
        np.sqrt([point["kl"] for point in rest]),
        np.array([point["gold"]["mean"] - start["gold"]["mean"] for point in rest]),
        np.array([point["proxy"]["mean"] - start["proxy"]["mean"] for point in rest]),
    )


def pooled(traces: Sequence[Trace]) -> Trace:
    """Means of an arm's points, sorted by d and cut into bins of as many."""
    d, gold = (np.concatenate([getattr(t, name) for t in traces]) for name in ("d", "gold"))
    proxy = np.concatenate([t.proxy for t in traces if t.proxy is not None])
    order = np.argsort(d, kind="stable")
    parts = np.array_split(order, min(BINS, len({round(float(x), 9) for x in d})))
    return Trace("", *(np.array([column[part].mean() for part in parts]) for column in (d, gold, proxy)))


def colour(study: Study, label: str) -> object:
    """An arm's own."""
    return study.styles[label].colour


def picture(
    name: str,
    caption: str,
    drawn: dict[str, tuple[Trace, object]],
    fits: dict[str, list[Fit | None]],
    joined: bool = True,
) -> Figure:
    """Gold and proxy of each, with the law that fits the gold.

    Args:
        name: of the files.
        caption: where the numbers are from.
        drawn: by label: what, and in which colour.
        fits: by label: those of its seeds.
        joined: connect the points.
    """
    with canvas(4.4) as (figure, axes):
        axes.axhline(0, color=FAINT, linewidth=0.8)
        for label, (trace, paint) in drawn.items():
            axes.plot(
                trace.d, trace.gold, "o-" if joined else "o", color=paint, markersize=5, linewidth=1.4, label=label
            )
            if trace.proxy is not None:
                axes.plot(
                    trace.d,
                    trace.proxy,
                    "s--" if joined else "s",
                    color=paint,
                    markersize=4.5,
                    markerfacecolor="white",
                    linewidth=1.2,
                )
            known = [one for one in fits[label] if one is not None]
            if known:
                grid = np.linspace(max(1e-3, trace.d.min() / 2), trace.d.max(), 100)
                law = np.mean([one.at(grid) for one in known], axis=0)
                axes.plot(grid, law, ":", color=paint, linewidth=2.2)
        entries: list[tuple[str, dict[str, object]]] = [
            ("gold", {"marker": "o", "linestyle": "-" if joined else "none"})
        ]
        if any(trace.proxy is not None for trace, _ in drawn.values()):
            hollow: dict[str, object] = {
                "marker": "s",
                "linestyle": "--" if joined else "none",
                "markerfacecolor": "white",
            }
            entries.append(("proxy", hollow))
        if any(one is not None for found in fits.values() for one in found):
            entries.append(("fit to gold", {"linestyle": ":", "linewidth": 2.2}))
        for label, style in entries:
            axes.plot([], [], color=FAINT, label=label, **style)
        axes.set_xlabel(D)
        axes.set_ylabel("reward above the start")
        legend(figure, axes, len(drawn) + len(entries))
        return replace(
            finish(figure, name, f"gold and proxy reward against {D}, of {', '.join(drawn)}"), caption=caption
        )


def _rows(form: Form, fits: dict[str, list[Fit | None]]) -> list[list[Cell]]:
    """The arms' fits, each over its seeds; of arms that have any."""
    rows = []
    for label, found in fits.items():
        known = [one for one in found if one is not None]
        if not known:
            continue
        alpha, beta = (OverSeeds.of([getattr(one, name).mean for one in known]) for name in ("alpha", "beta"))
        rows.append(
            [
                Cell(label),
                plain(LAWS[form]),
                Cell(number(alpha.estimate.mean), (seeds_note(alpha),)),
                Cell(number(beta.estimate.mean), (seeds_note(beta),)),
                Cell(", ".join(f"{one.r2:.2f}" for one in known), ("of each seed",) if len(known) > 1 else ()),
                plain(sum(one.points for one in known)),
                Cell(", ".join(_peak(one) for one in known)),
            ]
        )
    return rows


def _regression(label: str, found: Fit) -> list[Cell]:
    """One fit, with the regression's own intervals."""
    return [
        Cell(label, ("over arms",)),
        plain(LAWS[found.form]),
        *(Cell(number(one.mean), (interval(one),)) for one in (found.alpha, found.beta)),
        Cell(f"{found.r2:.2f}"),
        plain(found.points),
        Cell(_peak(found)),
    ]


def _peak(found: Fit) -> str:
    return "none" if found.peak is None else number(found.peak)
