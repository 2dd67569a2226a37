"""What a check says, how far two computations may lie apart, and the table of the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import nn

from rlhf_lit.errors import UserError, printable

# All there are; a run gets those that its algorithm and its rows allow.
NAMES = (
    "trainable parameters",
    "text kept",
    "one BOS",
    "supervised tokens",
    "EOS supervised",
    "padding",
    "sampler",
    "starting loss",
    "KL = 0",
    "reference",
    "loss at step 0",
    "ratio = 1",
    "reward scores",
    "reward alone",
)
Verdict = Literal["ok", "skipped", "left out", "warning", "failed"]
VERDICTS: tuple[Verdict, ...] = ("ok", "skipped", "left out", "warning", "failed")  # from best to worst
STYLES = {"ok": "green", "skipped": "dim", "left out": "dim", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Check:
    """What one check has to say.

    Attributes:
        name: of the check, as it stands in the table.
        verdict: only ``failed`` stops the run.
        found: what was seen, in a few words and numbers.
        advice: what to do about a failure or a warning.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


@dataclass(frozen=True)
class LeftOut:
    """Single checks that are not to be made.

    Args:
        skip: their names, as they stand in the table.
    """

    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {name.lower(): name for name in NAMES}
        for name in self.skip:
            if name not in NAMES:
                near = get_close_matches(name.lower(), names, n=1)
                hint = f"did you mean {names[near[0]]!r}?" if near else f"there are {', '.join(NAMES)}"
                raise UserError(f"preflight.skip: there is no check {name!r}; {hint}")

    def unless(self, name: str, check: Callable[[], Check]) -> Check:
        """What a check says, or that it is left out."""
        if name in self.skip:
            return Check(name, "left out", "by preflight.skip")
        return check()


def judge(name: str, passed: bool, found: str, advice: str) -> Check:
    """A check that either passed or stops the run."""
    return Check(name, "ok", found) if passed else Check(name, "failed", found, advice)


@dataclass(frozen=True)
class Tolerance:
    """How far two computations of one number may lie apart, in nats per token (of scores: relative to their size).

    Attributes:
        reshaped: the same row in batches of different shapes, where sums are taken in another order.
        same: the same batch through the same arithmetic.
        sampled: a token when it was drawn and when it is scored (``rollout.gap``).
    """

    reshaped: float
    same: float
    sampled: float


# Measured as the mean |Δ log-prob| over a row's tokens, the largest over rows, alone against padded in a batch (a
# trained 0.26 M-parameter Llama and random Qwen2s of 8 layers × 1024): at most 1e-6 in float32; 1e-3 with bfloat16
# weights and 6e-3 under bf16 autocast, where single tokens are off by 0.06, which is why the mean over a row is judged
# and not its largest token. Real faults are larger: positions counted from the pads, or pads attended to, move every
# token by tenths of a nat.
# A sampler is off by at most 2e-6 in float32; in bfloat16 random models of 8 layers × 128 (Llama, Qwen3-MoE, OLMoE) are
# by 0.003 to 0.05 in the median token, broken ones (RWKV's states, DeepSeek-V4's padding) by 0.3 and more.
FULL_WIDTH = Tolerance(reshaped=1e-4, same=1e-5, sampled=1e-4)
HALF_WIDTH = Tolerance(reshaped=0.05, same=1e-3, sampled=0.1)


def tolerance_of(model: nn.Module) -> Tolerance:
    """What the dtype allows: of the weights (4-bit ones compute in bfloat16), or of the autocast in force."""
    narrow = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    device = next((p.device.type for p in model.parameters()), "cpu")
    return HALF_WIDTH if narrow or torch.is_autocast_enabled(device) else FULL_WIDTH


def show(found: Sequence[Check], looked: object, seconds: float) -> None:
    """The table, a line for each check, and how many passed on what and in what time."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)  # colours on a terminal alone
    widths = [
        max(len(str(cell)) for cell in column) for column in zip(*((c.verdict, c.name) for c in found), strict=True)
    ]
    for check in found:
        said = f"{check.found}; {check.advice}" if check.verdict == "warning" else check.found
        verdict = (f"{check.verdict:<{widths[0]}}  ", STYLES[check.verdict])
        console.print(Text.assemble(verdict, f"{check.name:<{widths[1]}}  {printable(said)}"))
    counts = {verdict: sum(check.verdict == verdict for check in found) for verdict in VERDICTS}
    others = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS[1:] if counts[verdict]]
    console.print(
        f"preflight: {', '.join([count(counts['ok'], 'check') + ' passed', *others])} in {seconds:.1f} s ({looked})"
    )


def count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
