"""Evaluation of a trained model: on its own (``python -m rlhf_lit evaluate``) and in the loop (``WinRate``)."""

from rlhf_lit.evaluation.callback import WinRate

__all__ = ["WinRate"]
