"""The model, as in the paper's figure: encoder -> connector -> integration -> LLM."""

from __future__ import annotations

import hashlib
import reprlib
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pal import audio as audio_io
from pal.answering import generation_options
from pal.backbone import adapters
from pal.backbone.audio_kv import AudioKV
from pal.backbone.context import Hide
from pal.backbone.llm import Backbone, Per
from pal.backbone.sources import load_tokenizer
from pal.data.prompts import Conversation, encode, end_of_answer, user_turn
from pal.ears import Ears, check_ears
from pal.errors import AudioWarning, ConfigError, PromptError, shortened
from pal.integrations.routed import build_integration
from pal.model_config import ModelConfig
from pal.registry import check
from pal.types import AUDIO, AudioFeatures, Batch, Heard, LLMInputs, Prepared, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pal.integrations.base import Integration


Clips = Sequence[Tensor] | Sequence[Heard] | Prepared | Sequence[AudioKV]
"""Waveforms [N], clips that the encoders heard before, either made ready ahead, or clips with their keys and values."""


class Loss(NamedTuple):
    """Cross-entropy of a batch, kept apart so that means can be taken over several processes."""

    sum: Tensor
    items: int
    """Trained tokens, or answers, that the sum is over."""


@dataclass(frozen=True)
class Answer:
    """One answer, what it is based on, and what it cost."""

    text: str
    audio_seconds: float
    """Length of the clips given."""
    audio_seconds_used: float
    """Length that the encoder's tokens cover; equal to the seconds given, since nothing is cut."""
    audio_tokens: int
    """Audio tokens that the integration was given."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each step: encode, prefill, generate."""
    notes: tuple[str, ...] = ()
    """With `read_to_end`: clips whose length could not be checked, each with the reason."""


class PalModel(nn.Module):
    """A language model with ears.

    Build one with `pal.attach` (untrained) or `pal.load` (a bundle).
    """

    def __init__(self, config: ModelConfig, llm: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.llm = llm
        self.ears = Ears(config)
        self.integration: Integration = build_integration(config.integration, self.ears.streams, llm)
        self.source = "untrained"
        """What the model is called in answers and scores."""
        self._hidden: tuple[Hide, ...] = ()
        self.trained: set[str] = set()
        """Names of the parameters that training has changed since they came from their source."""

    @classmethod
    def from_config(cls, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PalModel:
        """A model with the LLM and encoder weights that `config` names and everything else untrained.

        It is in evaluation mode. A tokenizer may have more entries than the LLM has embeddings, as Gemma3's has;
        `place` refuses their use.
        """
        # An LLM can take minutes to load; a misspelt name is said before that.
        check_ears(config)
        check("integration", config.integration)
        llm = config.llm
        source = llm.path if llm.path is not None else llm.fresh
        assert source is not None
        backbone = Backbone.load(source, revision=llm.revision, dtype=getattr(torch, llm.dtype))
        if tokenizer is None:
            name = llm.tokenizer or llm.path
            if name is None:
                raise ConfigError("a fresh LLM needs a tokenizer; give 'llm.tokenizer' or 'llm.vocabulary'")
            tokenizer = load_tokenizer(name, None if llm.tokenizer else llm.revision)
        return cls(config, backbone, tokenizer).eval()

    # Parts

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return next(self.llm.parameters()).device

    @property
    def sampling_rate(self) -> int:
        """Hz of the waveforms that the model takes."""
        return self.ears.sampling_rate

    def parts(self) -> dict[str, nn.Module]:
        """The parts that a training stage can name."""
        return {
            "encoder": self.ears.encoders,
            "connector": self.ears.connectors,
            "projectors": self.integration,
            "llm": self.llm,
        }

    def train(self, mode: bool = True) -> PalModel:
        """Training mode for the parts that train; frozen ones stay in evaluation mode.

        Otherwise the dropout of a frozen part would stay on. Batch statistics move only where the layer's own weights
        are trained: where adapters are, beside frozen weights, nothing that is saved with them would hold the
        statistics.
        """
        super().train(mode)
        for part in (*self.ears.encoders, *self.ears.connectors, self.integration, self.llm):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
            for layer in part.modules():
                if getattr(layer, "track_running_stats", False) and not _trains(layer, part):
                    layer.eval()
        return self

    # Audio to LLM inputs

    @torch.inference_mode()
    def hear(self, samples_N: Tensor) -> Heard:
        """One clip at `sampling_rate` as the encoders hear it by itself, for many questions in any batches."""
        heard = self.ears.hear([samples_N])
        # copies, since a view would keep the padding, too
        real = tuple(stream.x_BAE[0, : stream.lengths[0]].clone() for stream in heard)
        return Heard(real, len(samples_N) / self.sampling_rate)

    def features(self, clips: list[Tensor] | list[Heard] | Prepared) -> list[AudioFeatures]:
        """Waveforms [N] at `sampling_rate`, what the encoders made of them, or what `Ears.prepare` did -> the features
        [B, A, E] of each stream.

        One a clip.
        """
        if isinstance(clips, Prepared):
            return self.ears.connect(self.ears.hear(clips))
        known = [clip for clip in clips if isinstance(clip, Heard)]
        unheard = [clip for clip in clips if isinstance(clip, Tensor)]
        assert not known or not unheard, "a batch's clips are all waveforms, or all heard before"
        return self.ears.connect(self.ears.recall(known) if known else self.ears.hear(unheard))

    def inputs(
        self,
        clips: Clips,
        rows: Sequence[Tokens],
        padding_side: Literal["left", "right", "none"] = "right",
        located: bool = False,
    ) -> LLMInputs:
        """Everything the LLM needs for a batch of conversations.

        Args:
            clips: waveforms [N], what the encoders made of them (`FeatureCache`), what `Ears.prepare` made of either,
                or what `index` did.
            rows: conversations; `Tokens.clips` are indices into `clips`.
            padding_side: "left" for generation; for training and scoring "right", or "none", which lays conversations
                one after the other (`Integration.forward`), quicker on a GPU.
            located: also say whose audio each row and key is, and when it sounds.
        """
        audio: Any = clips if isinstance(clips, Prepared) else list(clips)
        if audio and (isinstance(audio, Prepared) or not isinstance(audio[0], AudioKV)):
            audio = self.features(audio)
        return self.place(audio or None, rows, padding_side, located)

    def place(
        self,
        audio: Sequence[AudioFeatures] | Sequence[AudioKV] | None,
        rows: Sequence[Tokens],
        padding_side: Literal["left", "right", "none"] = "right",
        located: bool = False,
    ) -> LLMInputs:
        """`inputs` of clips that are features of each stream already, or indexed; None without any.

        All that is asked or scored goes through here, so that what `hiding` names is hidden from all of it.

        Raises:
            PromptError: an id that the LLM has no embedding for.
        """
        self._check_ids(rows)
        given: Any = audio
        inputs = self.integration(given, rows, self.llm, padding_side, located=located or bool(self._hidden))
        for what in self._hidden if inputs.audio is not None else ():
            inputs = replace(inputs, audio=inputs.audio.without(what))
        return inputs

    @contextmanager
    def hiding(self, *what: Hide) -> Iterator[None]:
        """While the block lasts, some of the audio is hidden from every query, in whatever is asked or scored.

        Raises:
            ConfigError: a stream or a layer that the model does not have, or an empty time.
        """
        for one in what:
            for times in (one.seconds, one.share):
                if times is not None and not 0 <= times[0] < times[1]:
                    raise ConfigError(
                        f"{times[0]:g} to {times[1]:g} cannot be hidden: the end must lie after the start"
                    )
            if one.stream is not None and not 0 <= one.stream < len(self.ears.streams):
                raise ConfigError(
                    f"stream {one.stream} cannot be hidden; the model has 0 to {len(self.ears.streams) - 1}"
                )
            wrong = sorted(set(one.layers or ()) - set(range(self.llm.n_layers)))
            if wrong:
                raise ConfigError(f"layer {wrong[0]} cannot be hidden; the LLM has 0 to {self.llm.n_layers - 1}")
        before, self._hidden = self._hidden, (*self._hidden, *what)
        try:
            yield
        finally:
            self._hidden = before

    def forward(self, batch: Batch, per: Per = "token") -> Loss:
        """Cross-entropy over the trained tokens of a batch (answers only); `per` says what counts alike."""
        return Loss(*self.llm.loss(self.inputs(batch.clips, batch.rows, self.llm.side), per))

    loss = forward

    @torch.inference_mode()
    def answer_scores(self, clips: Clips, rows: list[Tokens]) -> Tensor:
        """Log-likelihood of each row's labelled tokens, summed -> [B]."""
        return self.llm.label_scores(self.inputs(clips, rows, self.llm.side))

    # Answers

    @torch.inference_mode()
    def generate(
        self,
        clips: Clips,
        rows: list[Tokens],
        max_new_tokens: int = 64,
        **options: Any,
    ) -> list[str]:
        """One answer a conversation, or `num_return_sequences` one after the other.

        `options` are transformers' generation options; greedy without any.
        """
        options = generation_options({"max_new_tokens": max_new_tokens, **options}, self.tokenizer, several=True)
        if not rows:
            return []
        options = self._generation(options)
        ids_BT = self.llm.generate(self.inputs(clips, rows, self.llm.prompt_side(**options)), **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]

    def stream(self, clips: Clips, row: Tokens, max_new_tokens: int = 64, **options: Any) -> Iterator[str]:
        """The answer to one conversation, in pieces as they are made."""
        options = generation_options({"max_new_tokens": max_new_tokens, **options}, self.tokenizer, stream=True)
        with torch.inference_mode():  # at once, so that what is hidden now stays hidden while it is read
            options = self._generation(options)
            inputs = self.inputs(clips, [row], self.llm.prompt_side(**options))
        return self.llm.stream(inputs, self.tokenizer, **options)

    def _generation(self, options: dict[str, Any]) -> dict[str, Any]:
        ends = end_of_answer(self.tokenizer)
        ends = [token for token in ends if token < self.llm.vocab]
        # Generation needs some id for padding; which one is never seen.
        pad = self.tokenizer.pad_token_id
        if pad is None or pad >= self.llm.vocab:
            pad = (ends or [0])[0]
        return {"do_sample": False, "pad_token_id": pad, "eos_token_id": ends or None, **options}

    def fold(self) -> int:
        """Prepare for many answers: put together what can be done in one product; in how many layers that was.

        Where projectors are narrower inside than the LLM, a layer's norm and k and v projections go into the
        projector's last linear layer, equal to 1e-5. It takes a moment, is used as long as the weights, compared each
        time, are what they were, and never in training.
        """
        return sum(route.fold(self.llm) for route in self.integration.routes())

    @torch.inference_mode()
    def index(self, audio: Any, allow_urls: bool = False, read_to_end: bool = False) -> AudioKV:
        """A clip's audio as the keys and values of all injected layers, made once for many questions.

        The options are those of `ask`.
        """
        if isinstance(audio, AudioKV):
            audio.check(self.digest)
            return audio
        wave = audio_io.read_clip(audio, self.sampling_rate, allow_urls=allow_urls, read_to_end=read_to_end)
        _warn(_notes([wave]))
        return self.integration.index(self.features([wave.samples_N]), self.llm, self.digest, [wave.seconds_given])

    def ask(
        self,
        audio: Any,
        question: Any,
        stream: bool = False,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: Any,
    ) -> Any:
        """Answer questions about audio.

        Args:
            audio: a clip (a path, `(array, rate)`, another form of `pal.audio.sources`, or an `AudioKV`), or a list of
                clips.
            question: a string, a list of strings, or chat turns (`[{"role", "content"}, ...]`) with
                `<audio>` where each clip stands.
            stream: yield the text of a single answer piece by piece.
            allow_urls: follow http, https and file addresses of clips.
            read_to_end: take clips whose end cannot be known, such as a WAV written to a stream, as far as they go;
                an `AudioWarning` says which.
            options: transformers' generation options, such as `max_new_tokens` or `do_sample`.

        Returns:
            A string for one clip and one question. A list of strings for a list of questions about
            one clip (its audio is encoded once), or for one question about each clip of a list.
            Several clips go into one conversation where the question says so by as many `<audio>`.

        Raises:
            AudioError: a clip cannot be used.
            PromptError: clips and placeholders do not match.
        """
        generation_options(options, self.tokenizer, stream)  # said before a clip is decoded
        single, clips, rows = self._conversations(audio, question)
        loaded, _, notes = self._load(clips, allow_urls, read_to_end)
        _warn(notes)
        if stream:
            if len(rows) != 1:
                raise PromptError("stream=True takes one conversation; ask the others one by one")
            return self.stream(loaded, rows[0], **options)
        answers = self.generate(loaded, rows, **options)
        return answers[0] if single else answers

    @torch.inference_mode()
    def ask_detailed(
        self,
        audio: Any,
        question: Any,
        max_new_tokens: int = 64,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: Any,
    ) -> list[Answer]:
        """As `ask`, with seconds used, audio tokens and the time of each step; always a list."""
        options = generation_options({"max_new_tokens": max_new_tokens, **options}, self.tokenizer)
        _, clips, rows = self._conversations(audio, question)
        loaded, seconds, notes = self._load(clips, allow_urls, read_to_end)
        start = time.perf_counter()
        clips_heard: Any = loaded
        used = seconds
        if loaded and isinstance(loaded[0], Tensor):
            heard = self.ears.hear(loaded)
            clips_heard = self.ears.connect(heard)
            # the encoders' tokens tell what was heard; a connector's may stand for no time of their own
            used = [min(s, *(f.lengths[i] * f.seconds_per_token for f in heard)) for i, s in enumerate(seconds)]
        encoded = time.perf_counter()
        first = _FirstToken()
        options["logits_processor"] = [first, *(options.get("logits_processor") or ())]
        options = self._generation(options)
        inputs = self.place(clips_heard or None, rows, self.llm.prompt_side(**options))
        ids_BT = self.llm.generate(inputs, **options)
        texts = self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        done = time.perf_counter()
        timings = {"encode": encoded - start, "prefill": first.at - encoded, "generate": done - first.at}
        if clips_heard and isinstance(clips_heard[0], AudioFeatures):
            tokens = [sum(counts) for counts in zip(*(stream.lengths for stream in clips_heard), strict=True)]
        else:
            tokens = [clip.tokens for clip in clips_heard]
        return [
            Answer(
                text=text.strip(),
                audio_seconds=sum(seconds[clip] for clip in row.clips),
                audio_seconds_used=sum(used[clip] for clip in row.clips),
                audio_tokens=sum(tokens[clip] for clip in row.clips),
                seconds=timings,
                notes=notes,
            )
            for text, row in zip(texts, rows, strict=True)
        ]

    def _load(
        self, clips: list[Any], allow_urls: bool, read_to_end: bool
    ) -> tuple[list[Tensor] | list[AudioKV], list[float], tuple[str, ...]]:
        """Waveforms (or indexed clips, if all are), the seconds of each, and what could not be checked."""
        if clips and all(isinstance(clip, AudioKV) for clip in clips):
            for clip in clips:
                clip.check(self.digest)
            return clips, [clip.seconds for clip in clips], ()
        if any(isinstance(clip, AudioKV) for clip in clips):
            indexed = [self.index(clip, allow_urls, read_to_end) for clip in clips]
            return indexed, [clip.seconds for clip in indexed], ()
        waves = [
            audio_io.read_clip(clip, self.sampling_rate, allow_urls=allow_urls, read_to_end=read_to_end)
            for clip in clips
        ]
        return [wave.samples_N for wave in waves], [wave.seconds_given for wave in waves], _notes(waves)

    def _conversations(self, audio: Any, question: Any) -> tuple[bool, list[Any], list[Tokens]]:
        """Whether one plain answer is wanted, the clips, and the conversations about them."""
        clips = list(audio) if audio_io.is_list(audio) else [audio]
        turns = isinstance(question, list) and bool(question) and isinstance(question[0], dict)
        if isinstance(question, tuple):
            question = list(question)
        questions = question if isinstance(question, list) and not turns else [question]
        for text in question if turns else questions:
            if not (isinstance(text, dict) and "role" in text) if turns else not isinstance(text, str):
                raise PromptError(
                    f"a question is a text, or a list of chat turns with 'role' and 'content', not "
                    f"{shortened(reprlib.repr(text), 120)}"
                )
        if turns:
            return True, clips, [self._encode(question, list(range(len(clips))))]
        joint = len(clips) != 1 and isinstance(question, str) and ("<audio>" in question or not clips)
        if joint or len(clips) == 1:
            all_clips = list(range(len(clips)))
            rows = [self._encode([user_turn(text, len(clips))], all_clips) for text in questions]
            return isinstance(question, str), clips, rows
        if isinstance(question, str):
            questions = [question] * len(clips)
        if len(questions) != len(clips):
            raise PromptError(
                f"{len(clips)} clips and {len(questions)} questions; give one question, or as many as clips"
            )
        rows = [self._encode([user_turn(text, 1)], [i]) for i, text in enumerate(questions)]
        return False, clips, rows

    def _encode(self, conversation: Conversation, clips: list[int]) -> Tokens:
        if self.config.system and not any(turn["role"] == "system" for turn in conversation):
            conversation = [{"role": "system", "content": self.config.system}, *conversation]
        return encode(self.tokenizer, conversation, clips)

    def _check_ids(self, rows: Sequence[Tokens]) -> None:
        known = self.llm.vocab
        for row in rows:
            for number in row.ids:
                if not (0 <= number < known or number == AUDIO):
                    entry = self.tokenizer.convert_ids_to_tokens(number) if number >= 0 else None
                    named = f"'{str(entry)[:60]}' (id {number})" if entry else f"id {number}"
                    raise PromptError(
                        f"{named} is outside of the LLM's vocabulary of {known}; leave it out, or give the LLM a row "
                        "for it with resize_token_embeddings"
                    )

    # Identity

    @property
    def digest(self) -> str:
        """SHA-256 of all weights; equal for equal models, whatever file they came from."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def merge_adapters(self) -> None:
        """Fold adapters into the weights beside them, which a bundle then holds."""
        changed = {f"llm.{name}" for name in self.llm.merge_adapters()} | adapters.merge(self)
        self.trained = {name for name in self.trained if not {"base_layer", "lora_A", "lora_B"} & set(name.split("."))}
        self.trained |= changed

    def generation_options(self) -> dict[str, Any]:
        """What transformers' `generate` is told where nobody says otherwise: greedy, and how an answer ends."""
        return {"max_new_tokens": 64, **self._generation({})}

    def save_pretrained(
        self,
        folder: str | Path,
        full: bool = False,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Write a bundle; see `pal.bundle.save`."""
        from pal import bundle

        bundle.save(self, folder, full=full, dtype=dtype, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PalModel:
        """Read a bundle from a folder or the Hub; see `pal.bundle.load`."""
        from pal import bundle

        return bundle.load(path)


def _notes(waves: Sequence[audio_io.Waveform]) -> tuple[str, ...]:
    return tuple(f"{wave.name}: {wave.note}" for wave in waves if wave.note is not None)


def _warn(notes: Sequence[str]) -> None:
    for line in notes:
        warnings.warn(line, AudioWarning, stacklevel=3)


def _trains(layer: nn.Module, part: nn.Module) -> bool:
    """Whether a layer with batch statistics is trained: itself, or, where it has no weights, its part."""
    own = list(layer.parameters(recurse=False))
    return all(weight.requires_grad for weight in own or part.parameters())


class _FirstToken:
    """A logits processor that changes nothing and notes when the first logits came: the end of prefill."""

    only_watches = True
    at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.at:
            if scores.device.type == "cuda":
                torch.cuda.synchronize(scores.device)  # until then they are only asked for
            self.at = time.perf_counter()
        return scores
