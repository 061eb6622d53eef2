"""`pal listen`: a standing question to audio that is still arriving."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Thread
from typing import IO, TYPE_CHECKING, Annotated

import numpy as np
import typer

from pal.app.loading import load_model
from pal.app.options import Model, OtherWeights
from pal.app.output import note
from pal.errors import AudioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

_BLOCK = 0.1
"""Seconds of audio that are read at a time."""


def listen(
    audio: Annotated[
        str, typer.Argument(help="An audio file, or - for raw samples from standard input: 16 bits, mono, at --rate.")
    ],
    question: Annotated[str, typer.Argument(help="The standing question.")],
    model: Model = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds of audio between two answers.")] = 1.0,
    window: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of audio that the question is about; default: all so far.")
    ] = None,
    rate: Annotated[int | None, typer.Option(min=1, help="Hz of the raw samples; default: the model's.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Read a file as fast as it goes, not at its own pace.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 32,
    other_weights: OtherWeights = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each change.")] = False,
) -> None:
    """Answer a question about audio while it arrives; a line is printed when the answer changes.

    For a microphone: arecord -t raw -f S16_LE -c 1 -r 16000 | pal listen - "What do you hear?" --window 5
    """
    loaded = load_model(model, other_weights)
    if loaded.config.notice:
        note(loaded.config.notice)
    if rate is not None and rate != loaded.sampling_rate:
        raise AudioError(
            f"--rate {rate}: the model hears {loaded.sampling_rate} Hz; resample the stream, "
            f"for example with: sox -t raw -e signed -b 16 -c 1 -r {rate} - -t raw -r {loaded.sampling_rate} -"
        )
    if audio == "-":
        blocks = raw_blocks(sys.stdin.buffer, loaded.sampling_rate)
    else:
        from pal.clips import read_waveform

        blocks = paced_blocks(read_waveform(audio, loaded.sampling_rate).samples_N.numpy(), loaded.sampling_rate, fast)
    said: str | None = None
    with loaded.listen(window=window) as live:
        for samples_N in gathered(blocks, round(every * loaded.sampling_rate), ahead=not fast):
            live.append(samples_N)
            answer = live.ask(question, max_new_tokens=max_new_tokens)
            assert isinstance(answer, str)
            if answer != said:
                _show(live.seconds, answer, as_json)
                said = answer
        if not live.samples:
            raise AudioError(f"{audio}: no sample arrived; check what writes the stream")


def _show(seconds: float, answer: str, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps({"seconds": round(seconds, 3), "answer": answer}, ensure_ascii=False))
    else:
        minutes, rest = divmod(seconds, 60)
        typer.echo(f"{int(minutes):d}:{rest:04.1f}  {' '.join(answer.split())}")
    sys.stdout.flush()


def raw_blocks(stream: IO[bytes], rate: int) -> Iterator[Samples]:
    """Blocks of raw 16-bit samples; half a sample at the end is an error."""
    # below the buffer, whose lock a thread that still reads would hold when Python ends
    unbuffered = getattr(stream, "raw", stream)
    half = b""
    while data := unbuffered.read(2 * round(_BLOCK * rate)):
        data = half + data
        half = data[len(data) // 2 * 2 :]
        yield np.frombuffer(data[: len(data) - len(half)], "<i2").astype(np.float32) / np.float32(32768)
    if half:
        raise AudioError("standard input ended within a sample; raw samples have 16 bits each")


def paced_blocks(samples_N: Samples, rate: int, fast: bool) -> Iterator[Samples]:
    """Blocks of a file, each when it would have been recorded."""
    size, began = round(_BLOCK * rate), time.monotonic()
    for first in range(0, len(samples_N), size):
        block_N = samples_N[first : first + size]
        if not fast:
            time.sleep(max(0.0, began + (first + len(block_N)) / rate - time.monotonic()))
        yield block_N


def gathered(blocks: Iterator[Samples], least: int, ahead: bool) -> Iterator[Samples]:
    """Chunks of at least so many samples, the last one excepted.

    Args:
        blocks: as they arrive.
        least: samples of a chunk.
        ahead: read blocks in a thread; a chunk is then all that has arrived, so that a slow answer delays no later one.
    """
    waiting: list[Samples] = []
    for arrived in _in_thread(blocks) if ahead else ([block_N] for block_N in blocks):
        waiting += arrived
        if sum(map(len, waiting)) >= least:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _in_thread(blocks: Iterator[Samples]) -> Iterator[list[Samples]]:
    """Read blocks in a thread; each time, all that have arrived."""
    arrived: SimpleQueue[Samples | Exception | None] = SimpleQueue()

    def read() -> None:
        try:
            for block_N in blocks:
                arrived.put(block_N)
            arrived.put(None)
        except Exception as error:  # raised below, in the reader
            arrived.put(error)

    Thread(target=read, daemon=True).start()
    while True:
        some: list[Samples] = []
        last = arrived.get()
        while isinstance(last, np.ndarray):
            some.append(last)
            if arrived.empty():
                break
            last = arrived.get()
        if some:
            yield some
        if last is None:
            return
        if isinstance(last, Exception):
            raise last
