"""``report``: one page on runs that are compared, made from their folders alone.

``reading`` finds runs and reads what they left (``metrics`` their numbers), ``comparing`` says which of them are seeds
of one arm and how arms differ, ``evaluations`` finds what `evaluate` measured and ``evaluating`` makes it,
``statistics`` has the intervals and the fits, ``figures`` draws. ``study`` is all of that together, ``sections/`` has a
file for each part of the page, in terms of ``content``; ``page`` renders them, ``tables`` are the CSV files, ``folder``
puts everything in its place as a whole, ``command`` is the command line.
"""
