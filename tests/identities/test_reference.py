"""Every integration equals the plain-matmul reference, for every family, padding side and placement.

This is the ground the ten identities stand on: positions, windows, masks, norms, scalings and rotary
embeddings, with padding of rows and of clips in the batch.
"""

import pytest
import torch

from tests.identities.models import (
    FAMILIES,
    INTEGRATIONS,
    PLACEMENTS,
    conversation,
    expected_logits,
    features,
    shared,
    text_rows,
)


@pytest.mark.parametrize("name", INTEGRATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_the_reference(family, name):
    llm, integration = shared(family, name)
    audio = features(7, 11)
    other = conversation([7, 9, -1, 3, 4, 5, 6, 8], clips=(1,))
    rows = [*map(conversation, PLACEMENTS.values()), other]
    expected = [expected_logits(llm, integration, row, audio) for row in rows]
    for side in ("left", "right"):
        inputs = integration(audio, rows, llm, side)
        logits_BTV = llm(inputs).logits
        for at, (row, theirs) in enumerate(zip(rows, expected, strict=True)):
            ours = text_rows(llm, integration, row, inputs, logits_BTV, at)
            torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)
