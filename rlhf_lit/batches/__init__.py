"""Typed batch records, and where they are cut into micro-batches."""

from rlhf_lit.batches.records import (
    Batch,
    Comparisons,
    ExperienceBatch,
    PreferenceBatch,
    PromptBatch,
    RankedBatch,
    SupervisedBatch,
    UnpairedBatch,
)
from rlhf_lit.batches.sequences import Record, Sequences, common_prefix, same_prompts

__all__ = [
    "Batch",
    "Comparisons",
    "ExperienceBatch",
    "PreferenceBatch",
    "PromptBatch",
    "RankedBatch",
    "Record",
    "Sequences",
    "SupervisedBatch",
    "UnpairedBatch",
    "common_prefix",
    "same_prompts",
]
