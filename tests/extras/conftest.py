"""What the tests of the extras share."""

import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def case():
    """A function that makes a folder, which others may look into, and takes away the one before."""
    made = []

    def fresh() -> Path:
        while made:
            shutil.rmtree(made.pop())
        made.append(Path(tempfile.mkdtemp()))
        made[-1].chmod(0o755)
        return made[-1]

    yield fresh
    while made:
        shutil.rmtree(made.pop())
