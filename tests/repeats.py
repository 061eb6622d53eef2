"""What stands for CUDA graphs where there is no GPU."""

import torch


class Repeats:
    """Runs again what was recorded, and leaves the results where they were first."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def warm_up(self, run):
        run()

    def record(self, run):
        self.recorded += 1
        results = run()
        kept = [None if x is None else torch.full_like(x, torch.nan) for x in results]

        def replay():
            self.replayed += 1
            for into, x in zip(kept, run(), strict=True):
                if x is not None:
                    into.copy_(x)

        return replay, kept
