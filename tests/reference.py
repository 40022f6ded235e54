"""Numbers that the authors' functions gave: some in `vectors.json`, the full set where it is at hand."""

import json
from pathlib import Path

import pytest
from conftest import OUTSIDE

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
REFERENCE = OUTSIDE / "reference/vectors"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference vectors here")
