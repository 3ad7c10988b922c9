from __future__ import annotations

from pathlib import Path

import pytest
from written import File


@pytest.fixture
def config(tmp_path: Path) -> File:
    return File(tmp_path)
