"""``memory``: what a configuration needs, measured by the worst step it allows, before a run finds out by itself.

No data are read: the rows are random tokens, as long as the configuration lets them be. Everything else is the run's
own: its models, its precision, its optimizer, ``training_step``, and for PPO, RLOO and GRPO ``rollout``. Two optimizer
steps are made, the second with the optimizer's state in place, and the module is thrown away.

On CUDA the peaks are the allocator's. Elsewhere the bytes of live tensors are counted (``LiveBytes``), without what an
operation allocates inside itself.
"""
