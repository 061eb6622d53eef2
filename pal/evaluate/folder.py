"""Output folder of an evaluation: settings, a journal of answers, and at the end the items and the score.

| file | content |
|---|---|
| `settings.json` | settings that determine the answers; written first |
| `answers.N.jsonl` | answers of process N, one a line; deleted when the run is complete |
| `items.jsonl` | every item with its raw and its parsed answer |
| `score.json` | the score; written last, so that it exists if and only if the run is complete |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal.errors import BundleError, ConfigError
from pal.evaluate.result import ItemResult, Result
from pal.files import jsonable, write_json, write_text

SETTINGS, ITEMS, SCORE = "settings.json", "items.jsonl", "score.json"

IDENTITY = (
    *("benchmark", "options", "limit", "data_digest", "model_digest"),
    *("system", "after_clip", "decoding", "asks", "versions"),
)
"""Settings that determine the answers. A run can be resumed only if all of them are equal."""


@dataclass(frozen=True)
class Answer:
    """Raw model output to one question, with or without audio."""

    id: str
    with_audio: bool
    text: str | None
    """None if the item raised."""
    error: str | None = None

    def line(self) -> str:
        """Line of `answers.N.jsonl`."""
        content = {"id": self.id, "heard": self.with_audio, "text": self.text, "error": self.error}
        return json.dumps(content, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, line: str) -> Answer:
        """Inverse of `line`."""
        content = json.loads(line)
        return cls(content["id"], content["heard"], content["text"], content["error"])


class RunFolder:
    """Output folder of an evaluation."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # Settings

    def settings(self) -> dict[str, Any]:
        """Settings written by `open`. Raises BundleError if the folder holds no run."""
        path = self.path / SETTINGS
        if not path.is_file():
            raise BundleError(f"{self.path}: no {SETTINGS}; give a run folder of pal eval")
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise BundleError(f"{path}: damaged; copy the folder again, or repeat the evaluation") from None
        found.setdefault("after_clip", "\n")  # runs of earlier versions
        return found

    def open(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Start or resume a run.

        Raises:
            ConfigError: another run is in the folder; names the first setting that differs.
        """
        settings = jsonable(settings)
        if overwrite:
            self.clear()
        elif (self.path / SETTINGS).is_file():
            before = self.settings()
            other = [key for key in IDENTITY if before.get(key) != settings.get(key)]
            if other:
                raise ConfigError(
                    f"{self.path} holds another run: '{other[0]}' differs; give another --out, or --overwrite"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SETTINGS, settings)

    def clear(self) -> None:
        """Delete the files of `pal eval`, and nothing else."""
        for path in (self.path / SCORE, self.path / ITEMS, self.path / SETTINGS, *self._journals()):
            path.unlink(missing_ok=True)

    # Answers during the run

    def answers(self) -> dict[tuple[str, bool], str]:
        """(item, with audio) -> answer so far, without items that raised, which are retried."""
        found: dict[tuple[str, bool], str] = {}
        if (self.path / ITEMS).is_file():
            for one in self.items():
                for with_audio, text in ((True, one.output), (False, one.no_audio_output)):
                    if text is not None:
                        found[one.id, with_audio] = text
        for answer in self._lines():
            if answer.text is not None:
                found[answer.id, answer.with_audio] = answer.text
        return found

    def errors(self) -> dict[tuple[str, bool], str]:
        """(item, with audio) -> error message, from the processes of this run."""
        return {(a.id, a.with_audio): a.error for a in self._lines() if a.error is not None}

    def journal(self, process: int) -> Journal:
        """Journal for the answers of process `process`."""
        return Journal(self.path / f"answers.{process}.jsonl")

    def drop_errors(self) -> None:
        """Delete the errors of earlier processes of this run before their items are retried."""
        for path in self._journals():
            kept = [line for line in _whole_lines(path) if json.loads(line).get("error") is None]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> Iterator[Answer]:
        for path in self._journals():
            for line in _whole_lines(path):
                yield Answer.read(line)

    def _journals(self) -> list[Path]:
        return sorted(self.path.glob("answers.*.jsonl"))

    # The end

    def finish(self, result: Result) -> None:
        """Write items and score, and delete the journals."""
        lines = (json.dumps(jsonable(one.to_dict()), ensure_ascii=False) for one in result.items)
        write_text(self.path / ITEMS, "".join(f"{line}\n" for line in lines))
        write_json(self.path / SCORE, result.summary())
        for path in self._journals():
            path.unlink()

    def result(self) -> Result:
        """Result written by `finish`.

        Raises:
            BundleError: the run is incomplete or damaged.
        """
        path = self.path / SCORE
        settings = self.settings()
        if not path.is_file():
            raise BundleError(f"{self.path}: no {SCORE}; the run is incomplete; run the same pal eval again")
        items = self.items()
        try:
            return Result.from_dict(json.loads(path.read_text(encoding="utf-8")), settings, items)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BundleError(f"{path}: damaged; score it again with pal eval --rescore {self.path}") from None

    def items(self) -> list[ItemResult]:
        """Items written by `finish`. Raises BundleError if the run is incomplete or damaged."""
        path = self.path / ITEMS
        if not path.is_file():
            raise BundleError(f"{self.path}: no {ITEMS}; the run is incomplete; run the same pal eval again")
        found = []
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                found.append(ItemResult.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise BundleError(
                    f"{path}, line {number}: damaged; copy the folder again, or repeat the evaluation"
                ) from None
        return found


def load_result(path: str | Path) -> Result:
    """Load the result in a run folder or in a file of `Result.save`.

    Raises:
        BundleError: the path is neither of them, or damaged.
    """
    if not Path(path).exists():
        raise BundleError(f"{path}: no such folder or file; give a run folder, or a file of pal eval --json")
    return RunFolder(path).result() if Path(path).is_dir() else Result.load(path)


class Journal:
    """Append-only file of one process's answers. A line cut by a kill is dropped at the next start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_file():
            write_text(path, "".join(f"{line}\n" for line in _whole_lines(path)))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers and flush them to the operating system."""
        for answer in answers:
            self._file.write(answer.line())
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Complete lines of a file, without a last line that has no line feed.

    Not by splitlines(), which splits at more than line feeds.
    """
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
