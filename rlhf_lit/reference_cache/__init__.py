"""Log π₀ of response tokens, computed once and shared by every run that has the same rows and the same reference.

``identity`` says what a reference is: its weights, adapters, function and number formats, and nothing else. ``store``
is the cache of one reference: rows found again by their tokens and mask, in immutable files (``segments``) that are
written whole or not at all and trusted only when their checksum holds. ``catalogue`` says what lies in a cache folder.
"""
