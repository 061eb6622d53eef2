from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes of 1.5 seconds, three questions each."""
    from pal.data.synth import synthesise

    folder = tmp_path_factory.mktemp("scenes")
    return synthesise(folder, scenes=8, seed=5, seconds=1.5, questions_per_scene=3, workers=1)


@pytest.fixture(scope="module", autouse=True)
def without_plots() -> Iterator[None]:
    """Runs draw no `loss.png`, which takes longer than the training of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pal.train.curves.draw", lambda *given: True)
        yield
