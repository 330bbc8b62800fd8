"""Lets the tests of several processes share launching.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
