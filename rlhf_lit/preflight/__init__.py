"""Before the first optimizer step: what silently ruins runs, checked on a few real rows, in seconds.

Each check is a function that looks at one thing and returns a :class:`Check`: what it found and, where that is wrong,
what to do. The cheap ones read tokens alone; the others send a handful of rows through the models, under the run's own
precision. Nothing of the run is used up: the training loader, the random state, the modes and the weights are left as
they were found, so a run comes out the same to the bit with and without them.
"""
