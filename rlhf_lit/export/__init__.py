"""Exporting a trained model for plain transformers and peft: with a model card, as an adapter or merged.

A run's ``hf/``, written by ``models.saving`` at the end of ``fit``, is found and merged by ``trained``; ``comparison``
measures how far the export's logits are from those of the model in training, ``widths`` casts weights, ``card`` writes
the model card (``sources``: the data, ``usage``: how it is loaded), ``ollama`` a Modelfile, ``hub`` uploads the folder.

An adapter trained on a 4-bit base is never merged into the 4-bit weights, which would be rounded once more (peft #2321,
transformers #31293), but into the base in full precision, or into what its 4-bit weights stand for.
"""
