"""What a surviving rank says of a lost one, and how it ends."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_lit.files import short_path
from rlhf_lit.runs import newest_checkpoint

RANK_LOST = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, and it can be given again


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or did not answer in time."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def how_to_go_on(folder: Path) -> str:
    """What is left of a run, and the way on from there, in half a line."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return f"{short_path(folder)} has no checkpoint yet: start again"
    newest = short_path(checkpoint)
    return f"the newest whole checkpoint is {newest}: the same command with --ckpt_path=last goes on from it"
