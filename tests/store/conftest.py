"""A ring of a mebibyte, which is what writers are tested with."""

import pytest

from streammerge.budget import MIB, Budget
from streammerge.store.ring import Ring


@pytest.fixture
def ring():
    ring = Ring(Budget(64 * MIB), MIB, "a ring")
    yield ring
    ring.close()
