"""The folder of a run: settings, answers as they come, and the items and the score at the end.

| file | content |
|---|---|
| `settings.json` | what decides the answers; written first |
| `answers.N.jsonl` | what process N was answered, a line each; gone when the run is complete |
| `items.jsonl` | every item with its raw answer and what was read out of it |
| `score.json` | the score; written last, so that it is there if and only if the run is complete |
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

IDENTITY = ("benchmark", "options", "limit", "data_digest", "model_digest", "system", "decoding", "asks", "versions")
"""Settings that decide what the model answers. Where one differs, answers may not be mixed."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one question, with or without its audio."""

    id: str
    with_audio: bool
    text: str | None
    """None where the item raised."""
    error: str | None = None

    def line(self) -> str:
        """A line of `answers.N.jsonl`."""
        content = {"id": self.id, "heard": self.with_audio, "text": self.text, "error": self.error}
        return json.dumps(content, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, line: str) -> Answer:
        """What `line` made."""
        content = json.loads(line)
        return cls(content["id"], content["heard"], content["text"], content["error"])


class RunFolder:
    """One run on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # Settings

    def settings(self) -> dict[str, Any]:
        """What `open` wrote. Raises BundleError where the folder holds no run."""
        path = self.path / SETTINGS
        if not path.is_file():
            raise BundleError(f"{self.path}: no {SETTINGS}; give a folder that pal eval wrote")
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise BundleError(f"{path}: damaged; copy the folder again, or evaluate anew") from None
        return found

    def open(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin a run, or take it up again.

        Raises:
            ConfigError: another run is in the folder; names the first setting that differs.
        """
        settings = jsonable(settings)
        if overwrite:
            self.forget()
        elif (self.path / SETTINGS).is_file():
            before = self.settings()
            other = [key for key in IDENTITY if before.get(key) != settings.get(key)]
            if other:
                raise ConfigError(
                    f"{self.path} holds another run: '{other[0]}' differs; give another --out, or --overwrite"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SETTINGS, settings)

    def forget(self) -> None:
        """Remove what `pal eval` wrote here, and nothing else."""
        for path in (self.path / SCORE, self.path / ITEMS, self.path / SETTINGS, *self._journals()):
            path.unlink(missing_ok=True)

    # Answers while the run goes on

    def answers(self) -> dict[tuple[str, bool], str]:
        """(item, with audio) -> what was answered so far. What raised is not among it, so it is asked again."""
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
        """(item, with audio) -> why it raised, as the processes of this run wrote."""
        return {(a.id, a.with_audio): a.error for a in self._lines() if a.error is not None}

    def journal(self, process: int) -> Journal:
        """Where process number `process` writes its answers."""
        return Journal(self.path / f"answers.{process}.jsonl")

    def forget_errors(self) -> None:
        """Drop what raised in an earlier process of this run, before it is asked again."""
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
        """Write items and score, and drop the answers that they hold."""
        lines = (json.dumps(jsonable(one.to_dict()), ensure_ascii=False) for one in result.items)
        write_text(self.path / ITEMS, "".join(f"{line}\n" for line in lines))
        write_json(self.path / SCORE, result.summary())
        for path in self._journals():
            path.unlink()

    def result(self) -> Result:
        """What `finish` wrote.

        Raises:
            BundleError: the run is not complete, or damaged.
        """
        path = self.path / SCORE
        settings = self.settings()
        if not path.is_file():
            raise BundleError(f"{self.path}: no {SCORE}; the run is not complete, start the same pal eval again")
        items = self.items()
        try:
            return Result.from_dict(json.loads(path.read_text(encoding="utf-8")), settings, items)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BundleError(f"{path}: damaged; score it again with pal eval --rescore {self.path}") from None

    def items(self) -> list[ItemResult]:
        """The items that `finish` wrote. Raises BundleError where the run is not complete, or damaged."""
        path = self.path / ITEMS
        if not path.is_file():
            raise BundleError(f"{self.path}: no {ITEMS}; the run is not complete, start the same pal eval again")
        found = []
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                found.append(ItemResult.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise BundleError(f"{path}, line {number}: damaged; copy the folder again, or evaluate anew") from None
        return found


def load_result(path: str | Path) -> Result:
    """The result in a run's folder, or in a file that `Result.save` wrote.

    Raises:
        BundleError: neither, or damaged.
    """
    if not Path(path).exists():
        raise BundleError(f"{path}: no such folder or file; give a run's folder, or a file that pal eval --json wrote")
    return RunFolder(path).result() if Path(path).is_dir() else Result.load(path)


class Journal:
    """Answers of one process, appended as they come. A line cut by a kill is dropped at the next start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_file():
            write_text(path, "".join(f"{line}\n" for line in _whole_lines(path)))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def add(self, answers: Sequence[Answer]) -> None:
        """Append, out of this process's hands when it returns."""
        for answer in answers:
            self._file.write(answer.line())
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file but a last one without its end. Not splitlines(), which cuts at more than line feeds."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
