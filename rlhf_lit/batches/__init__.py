"""Typed batch records, and where they are cut into micro-batches."""

from rlhf_lit.batches.experience import ExperienceBatch, PromptBatch
from rlhf_lit.batches.micro_batches import Layout
from rlhf_lit.batches.records import (
    Batch,
    ComparedBatch,
    Comparisons,
    PreferenceBatch,
    RankedBatch,
    SupervisedBatch,
    UnpairedBatch,
)
from rlhf_lit.batches.sequences import Record, Sequences, same_prompts

__all__ = [
    "Batch",
    "ComparedBatch",
    "Comparisons",
    "ExperienceBatch",
    "Layout",
    "PreferenceBatch",
    "PromptBatch",
    "RankedBatch",
    "Record",
    "Sequences",
    "SupervisedBatch",
    "UnpairedBatch",
    "same_prompts",
]
