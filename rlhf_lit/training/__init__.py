"""The parts of an optimisation step beside the loss: optimizer, reduction of gradients, checkpoints."""
