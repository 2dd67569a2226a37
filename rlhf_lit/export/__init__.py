"""Saving, merging and exporting a trained model, so that plain transformers and peft load it: the one room for that.

``saving`` writes a run's ``hf/`` at the end of ``fit``. The command takes it from there: the adapter with a model card,
or the adapter merged into whole weights (``trained``), and how far the result is from what was trained
(``comparison``).

An adapter trained on a 4-bit base is never merged into the 4-bit weights, which would be rounded once more (peft #2321,
transformers #31293), but into the base in full precision, or into what its 4-bit weights stand for.
"""
