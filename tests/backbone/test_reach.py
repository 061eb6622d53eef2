"""Keys that rows see, as rectangles and as a mask: the same; and the places of what is generated."""

from unittest.mock import Mock

import torch

from pal.backbone.attention_masks import continued
from pal.backbone.audio_keys import AudioKeys


def test_rectangles_show_what_the_mask_shows() -> None:
    order_BA = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 0]])
    mask_BA = torch.tensor([[True] * 4, [True, True, True, False]])
    keys = AudioKeys(Mock(), (0,), None, order_BA, order_BA, order_BA, mask_BA)
    queries_BQ = torch.tensor([[0, 1, 1, 2, 6], [0, 0, 1, 3, 3]])
    seen_B1QA = keys.seen(None, queries_BQ, queries_BQ, 1)
    assert seen_B1QA.any() and not seen_B1QA.all()
    found_BQA = torch.zeros(2, 5, 4, dtype=torch.bool)
    for piece in keys.tiles(None, queries_BQ, queries_BQ, 1):
        rows, queries, seen = (range(*part) for part in (piece.rows, piece.queries, piece.keys))
        for b in rows:
            for i, query in enumerate(queries):
                for j, key in enumerate(seen):
                    masked = piece.mask is not None and piece.mask[min(b - rows[0], len(piece.mask) - 1), 0, i, j] < 0
                    found_BQA[b, query, key] |= not masked and not (piece.causal and j > i)
    assert torch.equal(found_BQA, seen_B1QA[:, 0])


def test_what_is_generated_stands_behind_the_last_real_row() -> None:
    places_BT = torch.tensor([[0, 1, 5, 0], [0, 0, 1, 2]])  # padded on the right, and on the left
    assert continued(places_BT, 6, 1)[:, 4:].tolist() == [[6, 7], [3, 4]]
    assert torch.equal(continued(places_BT, 3, 1), places_BT[:, :3])
    assert continued(places_BT, 5, 2)[:, 4].tolist() == [6, 6, 3, 3]
