"""A small benchmark of made-up clips, and a model whose answers come from a function."""

from pal.evaluate.benchmark import Benchmark
from pal.evaluate.items import Item
from tests import published

CHOICES = ("yes", "no", "a loud siren")


def made(root, clips=5, questions=4, rule="exact"):
    items = []
    for number in range(clips):
        path = root / "audio" / f"{number}.wav"
        published.clip(path, 0.1 + 0.05 * number)
        items += [
            Item(f"{number}-{q}", (str(path),), f"Is it {q}?", ("yes",), CHOICES, {"asks": (str(q),)})
            for q in range(questions)
        ]
    return Benchmark("made", tuple(items), {"name": rule}, root)


class Scripted:
    """The model, but its answers come from a function of the prompt; counts what it was asked."""

    def __init__(self, model, say):
        self._model, self._say = model, say
        self.asked = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, clips, rows, **options):
        texts = [self._say(self._model.tokenizer.decode([i for i in r.ids if i >= 0]), bool(r.clips)) for r in rows]
        self.asked += len(rows)
        return texts


def files(folder):
    return sorted(path.name for path in folder.iterdir())
