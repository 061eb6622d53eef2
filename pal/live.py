"""`LiveAudio`: audio that is still arriving, and can be asked at any time.

An append encodes what is new, and what may still change: an encoder's last window, or the tokens near the end that
depend on what comes next. All before is settled: its keys and values are made once. At any moment the stream is an
`AudioKV`, equal to that of a file with the same samples.

How much may still change is said by `Encoder.reach_seconds` and `Connector.reach`. Where either is None and there are
no windows (a connector whose tokens see the whole clip, such as a Q-Former), nothing settles and an append makes
everything anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pal import answering
from pal.answering import default_options, generation_options
from pal.backbone.audio_kv import AudioKV
from pal.backbone.growing import GrowingTensor
from pal.backbone.session import Session
from pal.backbone.stream_kv import Layout, StreamKV
from pal.clips import ClipFeatures
from pal.connectors.base import Connector
from pal.conversations import Question, read_question
from pal.encoders.stream import EncoderStream
from pal.errors import AudioError, ConfigError
from pal.types import AUDIO, AudioFeatures, Tokens

if TYPE_CHECKING:
    from pal.integrations.base import Route
    from pal.model import PalModel


_CLOSED = "this stream was closed; begin another with model.listen()"


class LiveAudio:
    """Audio that is still arriving; `PalModel.listen` makes it.

    Args:
        model: in evaluation mode. Its weights must not change while it listens.
        window: seconds that are kept; None keeps all. Where keys and values settle, older ones are dropped in whole
            groups of tokens, as `AudioKV.slice` does; else older samples are dropped.
        int8: keep keys and values as `AudioKV.quantized` does.

    Raises:
        ConfigError: a window for a model whose tokens stand for no time of their own.
    """

    def __init__(self, model: PalModel, window: float | None = None, int8: bool = False) -> None:
        if window is not None and not (isinstance(window, Real) and 0 < window < math.inf):
            raise ConfigError(f"a stream's window is a number of seconds above 0, not {window!r}")
        self.model = model
        self.window, self.int8 = window, int8
        self.samples = 0
        """Samples so far, at `PalModel.sampling_rate`."""
        self._digest = model.digest
        ears = model.ears
        self._encoders = [EncoderStream(ears.encoder(i), ears.sampling_rate) for i in range(len(ears.encoders))]
        self._streams = [
            _StreamTail(connector, indices, route, model, int8)  # type: ignore[arg-type]
            for connector, indices, route in zip(
                ears.connectors, ears.encoder_indices, model.integration.routes(), strict=True
            )
        ]
        if window is not None and not all(stream.layout.seconds_per_token for stream in self._streams):
            raise ConfigError("this model's tokens stand for no time of their own; listen without a window")
        self._session: tuple[list[int], Session] | None = None
        """Text before the clip, and the conversation that begins with it."""
        self._recent_N = torch.zeros(0)
        """The window's samples, where nothing settles."""

    def __enter__(self) -> LiveAudio:
        return self

    def __exit__(self, *error: object) -> None:
        self._encoders, self._streams, self._session = [], [], None

    @property
    def seconds(self) -> float:
        """Seconds so far, those that have left the window included."""
        return self.samples / self.model.sampling_rate

    @torch.inference_mode()
    def append(self, samples: Any) -> None:
        """Hear more.

        Args:
            samples: mono, float, [N] at `PalModel.sampling_rate`; a chunk of any length.

        Raises:
            AudioError: another shape, or numbers that are not finite.
        """
        if not self._streams:
            raise AudioError(_CLOSED)
        samples_N = torch.as_tensor(samples).detach().cpu()
        if len(samples_N) and not samples_N.is_floating_point():
            raise AudioError(
                f"a stream's samples are floats of -1 to 1, not {samples_N.dtype}; scale the integers first"
            )
        samples_N = samples_N.float()
        if samples_N.ndim != 1:
            raise AudioError(f"a stream takes mono samples [N], not {list(samples_N.shape)}; mix the channels first")
        if not bool(torch.isfinite(samples_N).all()):
            raise AudioError("a stream's samples must be finite; check where they come from")
        if not len(samples_N):
            return
        self.samples += len(samples_N)
        if self.window is not None and not self.settles:
            most = max(1, round(self.window * self.model.sampling_rate))
            self._recent_N = torch.cat((self._recent_N, samples_N))[-most:]
            return
        heard = [encoder.append(samples_N) for encoder in self._encoders]
        for stream in self._streams:
            stream.append([heard[i] for i in stream.indices], self.model)
            if self.window is not None:
                stream.forget(self.seconds - self.window)

    @property
    def settles(self) -> bool:
        """True if keys and values become final while more audio arrives."""
        return all(one.settles for one in self._encoders) and all(one.settles for one in self._streams)

    @property
    @torch.inference_mode()
    def audio(self) -> AudioKV:
        """What was heard, as audio keys and values.

        Raises:
            AudioError: nothing was heard yet, or the stream was closed.
        """
        if not self._streams:
            raise AudioError(_CLOSED)
        if not self.samples:
            raise AudioError("nothing was heard yet; append samples first")
        if len(self._recent_N):
            model, seconds = self.model, len(self._recent_N) / self.model.sampling_rate
            features = model.features([self._recent_N])
            made = model.integration.index(features, model.llm, self._digest, [seconds])
            return made.quantized() if self.int8 else made
        begin = 0.0 if self.window is None else self.seconds - self.window
        kept = [stream.keys_values(begin) for stream in self._streams]
        seconds = self.seconds - min(start for _, start in kept)
        return AudioKV(streams=tuple(stream for stream, _ in kept), durations=(seconds,), digest=self._digest)

    def ask(self, question: Question, **options: Any) -> str | list[str]:
        """As `PalModel.ask`, about what was heard so far, without streaming the answer."""
        asked = read_question(question, 1, self.model.tokenizer, self.model.config.style)
        if self.samples and self._streams and len(asked.tokens) == 1:
            text = self._ask_in_session(asked.tokens[0], options)
            if text is not None:
                return text if asked.single else [text]
        heard = self.audio
        answers = answering.generate(self.model, ClipFeatures([heard], [heard.seconds]), asked.tokens, **options)
        return answers[0] if asked.single else answers

    @torch.inference_mode()
    def _ask_in_session(self, asked: Tokens, options: dict[str, Any]) -> str | None:
        """The answer from a `Session`, which hears each settled group once; None where there can be none.

        The session forgets the question, its answer, and the audio that may still change.
        """
        model, stream = self.model, self._streams[0]
        options = generation_options({"max_new_tokens": 64, **options}, model.tokenizer)
        options = {**default_options(model.tokenizer, model.llm.vocab), **options}
        alone = len(self._streams) == 1 and self.window is None and self.settles
        if not alone or not Session.suits(model.llm, stream.layout) or not Session.answers_with(model.llm, options):
            return None
        place = asked.ids.index(AUDIO)
        before, after = asked.ids[:place], asked.ids[place + 1 :]
        if not before or not after or AUDIO in after:
            return None
        if self._session is None or self._session[0] != before:
            session = stream.route.session(model.llm, stream.layout)
            session.read(before)
            self._session = (before, session)
        session = self._session[1]
        try:
            if stream.kv is not None and stream.kv.tokens > session.tokens:
                session.hear(stream.kv.view(session.tokens))
            mark = session.mark()
            if stream.rest is not None:
                session.hear(stream.rest)
            said_1N = session.answer(after, **options)
            session.back_to(mark)
        except BaseException:  # it holds a part of the question, or of a layer
            self._session = None
            raise
        text: str = model.tokenizer.batch_decode(said_1N, skip_special_tokens=True)[0]
        return text.strip()


class _StreamTail:
    """One stream: settled keys and values, and the end of its features."""

    def __init__(self, connector: Connector, indices: Sequence[int], route: Route, model: PalModel, int8: bool) -> None:
        self.connector, self.indices, self.route, self.int8 = connector, list(indices), route, int8
        local = len(self.indices) == 1 and connector.reach is not None
        self.reach = connector.reach if local else None
        one = []
        for encoder in (model.ears.encoder(i) for i in self.indices):
            x_11E = torch.zeros(1, 1, encoder.width, device=model.device, dtype=next(connector.parameters()).dtype)
            one.append(AudioFeatures(x_11E, (1,), encoder.seconds_per_token))
        with torch.no_grad():
            self.layout: Layout = route.inject(connector(*one), model.llm).layout
        self.inputs: list[Tensor] = []
        """Settled features of each encoder that the connector still needs."""
        self.first = 0
        """Features before these."""
        self.given = 0
        """Settled features so far."""
        self.out = 0
        """Settled tokens of the connector so far."""
        self.waiting_AE: Tensor | None = None
        """Settled tokens that do not fill a group yet."""
        self.kv: _GrowingKV | None = None
        self.rest: StreamKV | None = None
        """What may still change, or does not fill a group; None if that is nothing."""
        self.dropped = 0
        """Settled tokens that have left the window."""

    @property
    def settles(self) -> bool:
        """True if keys and values become final while more features arrive."""
        return self.reach is not None and not self.layout.joint

    def append(self, heard: Sequence[tuple[Tensor, Tensor]], model: PalModel) -> None:
        """Take new features: of each encoder the settled ones and the rest."""
        settled = [new_AE for new_AE, _ in heard]
        before = self.inputs or [x_AE[:0] for x_AE in settled]
        self.inputs = [torch.cat(pair) for pair in zip(before, settled, strict=True)]
        self.given += len(settled[0])
        encoders = [model.ears.encoder(i) for i in self.indices]
        features = [
            AudioFeatures(torch.cat((x_AE, rest_AE))[None], (len(x_AE) + len(rest_AE),), encoder.seconds_per_token)
            for x_AE, (_, rest_AE), encoder in zip(self.inputs, heard, encoders, strict=True)
        ]
        made = self.connector(*features)
        tokens_AE = made.x_BAE[0, : made.lengths[0]]
        new_AE, rest_AE = self._settle(tokens_AE)
        waiting_AE = new_AE if self.waiting_AE is None else torch.cat((self.waiting_AE, new_AE))
        group = self.layout.tokens
        whole = len(waiting_AE) // group * group if self.settles else 0
        if whole:
            chunk = self._stream_kv(model, waiting_AE[:whole], made.seconds_per_token)
            self.kv = self.kv or _GrowingKV(chunk)
            self.kv.append(chunk)
        self.waiting_AE = waiting_AE[whole:]
        end_AE = torch.cat((self.waiting_AE, rest_AE))
        self.rest = self._stream_kv(model, end_AE, made.seconds_per_token) if len(end_AE) else None

    def forget(self, until: float) -> None:
        """Drop settled groups that end before a time in seconds."""
        tokens = self._tokens_before(until)
        if self.kv is not None and tokens:
            tokens = min(tokens, self.kv.tokens)
            self.kv.drop(tokens)
            self.dropped += tokens

    def keys_values(self, begin: float) -> tuple[StreamKV, float]:
        """Keys and values of the groups that end after `begin`, and when they begin, in seconds."""
        whole = self.rest
        if self.kv is not None and self.kv.tokens:
            whole = self.kv.view() if self.rest is None else self.kv.view().append(self.rest)
        assert whole is not None
        seconds, group = self.layout.seconds_per_token, self.layout.tokens
        tokens = min(self._tokens_before(begin), (whole.lengths[0] - 1) // group * group)
        if tokens:
            whole = whole.slice(tokens * seconds, whole.lengths[0] * seconds)
        return whole, (self.dropped + tokens) * seconds

    def _tokens_before(self, until: float) -> int:
        """Tokens kept so far in whole groups that end before a time in seconds."""
        if until <= 0:
            return 0
        groups = int(until / (self.layout.seconds_per_token * self.layout.tokens) + 1e-6)
        return max(0, groups * self.layout.tokens - self.dropped)

    def _settle(self, tokens_AE: Tensor) -> tuple[Tensor, Tensor]:
        """Split the connector's tokens into newly settled ones and the rest; drop features that are not needed."""
        stride = self.connector.stride
        first = self.first // stride
        if self.reach is None:
            return tokens_AE[:0], tokens_AE
        settled = max(self.out, (self.given - self.reach) // stride)
        new_AE, rest_AE = tokens_AE[self.out - first : settled - first], tokens_AE[settled - first :]
        self.out = settled
        drop = max(0, settled * stride - self.reach) // stride * stride - self.first
        self.inputs = [x_AE[drop:] for x_AE in self.inputs]
        self.first += drop
        return new_AE, rest_AE

    def _stream_kv(self, model: PalModel, x_AE: Tensor, seconds: float) -> StreamKV:
        made = self.route.stream_kv(AudioFeatures(x_AE[None], (len(x_AE),), seconds), model.llm)
        return made.quantized() if self.int8 else made


class _GrowingKV:
    """Keys, values and rows of one clip that grows at its end and may be dropped at its beginning, in whole groups."""

    def __init__(self, like: StreamKV) -> None:
        self.like = like
        self.tokens = 0
        self._buffers = {name: GrowingTensor(1 if name == "rows_BSD" else 3) for name in like.tensors()}

    def append(self, chunk: StreamKV) -> None:
        """Add groups."""
        for name, x in chunk.tensors().items():
            self._buffers[name].append(x)
        self.tokens += chunk.lengths[0]

    def drop(self, tokens: int) -> None:
        """Forget groups at the beginning."""
        rows = tokens // self.like.layout.tokens * self.like.layout.rows
        for name, buffer in self._buffers.items():
            buffer.drop(min(rows if name == "rows_BSD" else tokens, buffer.used))  # PLITS has no keys
        self.tokens -= tokens

    def view(self, first: int = 0) -> StreamKV:
        """The clip from token `first` on, the first of a group, without a copy."""
        rows = first // self.like.layout.tokens * self.like.layout.rows
        tensors: dict[str, Any] = {}
        for name, buffer in self._buffers.items():
            left_out = min(rows if name == "rows_BSD" else first, buffer.used)  # PLITS has no keys
            tensors[name] = buffer.view().narrow(buffer.axis, left_out, buffer.used - left_out)
        return replace(self.like, lengths=(self.tokens - first,), **tensors)
