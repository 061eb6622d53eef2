"""One tiny model for all tests of a worker."""

import pytest

from tests.evaluate.scripted import made
from tests.models import tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model("lal")


@pytest.fixture
def benchmark(tmp_path):
    return made(tmp_path)
