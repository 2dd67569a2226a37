"""The tiny models of the unit tests, for comparison with peers and closed forms."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
