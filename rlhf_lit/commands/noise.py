"""What libraries say that does not apply to runs made here."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from rlhf_lit.errors import is_live

NOISE = (
    r"LightningCLI's args parameter is intended",  # the front door reads sys.argv once, for all commands
    r"Using ModelCheckpoint with manual optimization",  # it advises to save the weights before the step; we want after
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    r"The dirpath has changed",  # a new run from another one's checkpoint
    r"Couldn't infer the batch indices",  # predictions carry their rows
    r".*does not have many workers",
    r"Total length of `list` across ranks is zero",  # no validation rows were asked for
    r"The number of training batches .* is smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode",  # DPO and PPO train without dropout, and frozen models stay in eval
    r"You have overridden `on_before_batch_transfer`",  # the module adds the cached reference's log-probs there
    r"`max_epochs` was not set",  # said in our own words, and not where data.episodes is set
    r"`is_gradient_checkpointing` is deprecated",  # asked by peft, not by us
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet_libraries() -> None:
    """Silence Lightning's banners, transformers' bars, and the warnings that do not apply to runs made here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a profiler's report is such a message
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    from transformers.utils import logging as transformers_logging

    if not is_live(sys.stderr):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a bar in a file is a thousand lines
    transformers_logging.disable_progress_bar()  # "Loading weights", for every model of a run
