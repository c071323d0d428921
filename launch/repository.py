"""Where the repository is; importing this makes its package `bigbatch` importable.

A script of launch/ needs nothing but Python, so it may import only the parts of the package that
are plain Python: `bigbatch.job.statuses` and `bigbatch.job.chips`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Behind launch/ itself, and before a bigbatch that is installed elsewhere.
sys.path.insert(1, str(ROOT))
