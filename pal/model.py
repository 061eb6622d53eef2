"""The model, as in the paper's figure: encoder -> connector -> integration -> LLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from pal import answering, bundle, long_clips
from pal.answering import DetailedAnswer, default_options, generation_options
from pal.audio_tower import AudioTower, check_audio_tower
from pal.backbone import adapters
from pal.backbone.audio_kv import AudioKV
from pal.backbone.audio_mask import AudioMask
from pal.backbone.finetuning import keep_frozen_in_evaluation
from pal.backbone.llm import Backbone
from pal.backbone.loss import Per
from pal.backbone.sources import load_tokenizer
from pal.chat import Chat
from pal.clips import (
    AudioInput,
    Clip,
    ClipBatch,
    ClipFeatures,
    Clips,
    clip_list,
    read_clip,
    read_waveform,
    to_one_kind,
    warn_of,
)
from pal.conversations import ChatTurns, Question, check_ids, read_question
from pal.digest import CachedModelDigest
from pal.errors import ConfigError, PromptError
from pal.integrations.routed import build_integration
from pal.live import LiveAudio
from pal.model_config import ModelConfig
from pal.registry import check
from pal.types import AudioFeatures, Batch, EncodedClip, LLMInputs, PaddingSide, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pal.integrations.base import Integration


class Loss(NamedTuple):
    """Summed cross-entropy and its number of items, from which means over several processes are computed."""

    sum: Tensor
    items: int
    """Number of labelled tokens, or of answers."""


class PalModel(nn.Module):
    """An audio language model: encoders, connectors, integration and LLM.

    Build one with `pal.attach` (untrained) or `pal.load` (a bundle).
    """

    def __init__(self, config: ModelConfig, llm: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.llm = llm
        self.ears = AudioTower(config)
        self.integration: Integration = build_integration(config.integration, self.ears.streams, llm)
        self._digest = CachedModelDigest()
        self.source = "untrained"
        """Name of the model in answers and scores."""
        self._masks: tuple[AudioMask, ...] = ()
        self._with_spans = False
        self.trained: set[str] = set()
        """Names of the parameters that differ from their source because of training."""

    @classmethod
    def from_config(cls, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PalModel:
        """Build a model in evaluation mode, with the LLM and encoder weights that `config` names, the rest untrained.

        A tokenizer may have more entries than the LLM has embeddings, as Gemma3's has; `inputs` refuses their ids.
        """
        # An LLM can take minutes to load; report misspelt names before.
        check_audio_tower(config)
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
        """Device of the LLM."""
        return next(self.llm.parameters()).device

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the waveforms in Hz."""
        return self.ears.sampling_rate

    def parts(self) -> dict[str, nn.Module]:
        """Parts of the model, by their names in a training stage."""
        return {
            "encoder": self.ears.encoders,
            "connector": self.ears.connectors,
            "projectors": self.integration,
            "llm": self.llm,
        }

    def train(self, mode: bool = True) -> PalModel:
        """Set training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        keep_frozen_in_evaluation((*self.ears.encoders, *self.ears.connectors, self.integration, self.llm))
        return self

    # Audio to LLM inputs

    @torch.inference_mode()
    def encode_clip(self, clip: AudioInput) -> EncodedClip:
        """Encode one clip in a batch of its own, to be used for any number of questions."""
        found = read_clip(clip, self.sampling_rate)
        if isinstance(found, EncodedClip):
            return found
        return self.ears.encode_one(read_waveform(found, self.sampling_rate).samples_N)

    def features(self, clips: Clips) -> list[AudioFeatures]:
        """Features [B, A, E] of each stream, from waveforms [N] at `sampling_rate`, encoded or prepared clips."""
        return self.ears.connect(self.ears.encode(clips))

    def encode(self, clips: Clips) -> ClipFeatures:
        """Features of the clips of a batch, as the integration takes them; audio keys and values are passed on."""
        indexed = ClipBatch.of(clips).indexed
        if indexed or not len(clips):
            return ClipFeatures(indexed, [clip.seconds for clip in indexed])
        encoded = self.ears.encode(clips)
        return ClipFeatures.of_streams(self.ears.connect(encoded), encoded)

    def inputs(
        self,
        clips: Clips | ClipFeatures,
        conversations: Sequence[Tokens],
        padding_side: PaddingSide = "right",
        with_spans: bool = False,
    ) -> LLMInputs:
        """Inputs of the LLM for a batch of conversations.

        Generation, scoring and training all call this, so the masks of `hiding` apply to all of them.

        Args:
            clips: clips of the batch, or the result of `encode`.
            conversations: token ids; `Tokens.clips` are indices into `clips`.
            padding_side: "left" for generation; "any" for training and scoring (`Integration.forward`).
            with_spans: add stream, clip and time span of each row and key (`TokenSpans`).

        Raises:
            PromptError: an id that the LLM has no embedding for.
        """
        check_ids(conversations, self.llm.vocab, self.tokenizer)
        features = (clips if isinstance(clips, ClipFeatures) else self.encode(clips)).features or None
        inputs = self.integration(
            features, conversations, self.llm, padding_side, with_spans=with_spans or self._with_spans
        )
        for mask in self._masks if inputs.audio_context is not None else ():
            inputs = replace(inputs, audio_context=inputs.audio_context.without(mask))
        return inputs

    @contextmanager
    def hiding(self, *masks: AudioMask, with_spans: bool = False) -> Iterator[None]:
        """Context manager that hides audio from all queries in generation, scoring and training.

        Args:
            masks: audio to hide, by stream, layer or time.
            with_spans: add `TokenSpans` to all inputs, with or without masks.

        Raises:
            ConfigError: a mask of a stream or a layer that the model does not have, or of no time.
        """
        for mask in masks:
            mask.check(len(self.ears.streams), self.llm.n_layers)
        before = self._masks, self._with_spans
        self._masks, self._with_spans = (*self._masks, *masks), self._with_spans or with_spans or bool(masks)
        try:
            yield
        finally:
            self._masks, self._with_spans = before

    @property
    def hides(self) -> bool:
        """True inside `hiding`."""
        return self._with_spans

    def forward(self, batch: Batch, per: Per = "token") -> Loss:
        """Cross-entropy on the answers of a batch; `per` weights all tokens or all answers equally."""
        return Loss(*self.llm.loss(self.inputs(batch.clips, batch.conversations, "any"), per))

    loss = forward

    @torch.inference_mode()
    def answer_scores(self, clips: Clips, conversations: list[Tokens]) -> Tensor:
        """Log-likelihood [B] of each conversation: the sum over its labelled tokens."""
        return self.llm.label_scores(self.inputs(clips, conversations, "any"))

    # Answers

    @torch.inference_mode()
    def generate(
        self,
        clips: Clips | ClipFeatures,
        conversations: list[Tokens],
        max_new_tokens: int = 64,
        **options: Any,
    ) -> list[str]:
        """Answer each conversation, once or `num_return_sequences` times in a row.

        `options` are transformers' generation options; the default is greedy search.
        """
        options = generation_options({"max_new_tokens": max_new_tokens, **options}, self.tokenizer, several=True)
        if not conversations:
            return []
        options = {**default_options(self.tokenizer, self.llm.vocab), **options}
        heard = clips if isinstance(clips, ClipFeatures) else self.encode(clips)
        ids = answering.generate_ids(self, heard, conversations, options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def stream(self, clips: Clips, conversation: Tokens, max_new_tokens: int = 64, **options: Any) -> Iterator[str]:
        """Answer one conversation, piece by piece during generation."""
        options = generation_options({"max_new_tokens": max_new_tokens, **options}, self.tokenizer, stream=True)
        with torch.inference_mode():  # not in the iterator, so that the masks of `hiding` apply
            options = {**default_options(self.tokenizer, self.llm.vocab), **options}
            inputs = self.inputs(clips, [conversation], self.llm.prompt_side(**options))
        return self.llm.stream(inputs, self.tokenizer, **options)

    def fold(self) -> int:
        """Fuse linear layers for faster inference; returns the number of layers in which that was possible.

        If a projector is narrower inside than the LLM, its last linear layer is fused with the norm and the k and v
        projections of the LLM's layer; results are equal to 1e-5. Fused weights are used in inference only, and only
        while the original weights are unchanged, which each use checks.
        """
        return sum(route.fold(self.llm) for route in self.integration.routes())

    @torch.inference_mode()
    def index(self, audio: AudioInput, allow_urls: bool = False, read_to_end: bool = False) -> AudioKV:
        """Audio keys and values of a clip for all layers with audio, computed once for any number of questions.

        The options are those of `ask`. A long file is never whole in memory, where the model allows that.
        """
        made, notes = long_clips.index(self, audio, allow_urls, read_to_end)
        warn_of(notes)
        return made

    def listen(self, window: float | None = None) -> LiveAudio:
        """Audio that is still arriving, to be asked at any time; `window`: seconds that are kept, None for all."""
        return LiveAudio(self, window)

    def chat(self) -> Chat:
        """A conversation in which questions, answers and clips follow one another, each read once."""
        return Chat(self)

    def keys_values(self, clip: Clip) -> AudioKV:
        """`index` of a clip that was read."""
        if isinstance(clip, AudioKV):
            clip.check(self.digest)
            return clip
        return self.integration.index(self.features(self.ready([clip])), self.llm, self.digest, [clip.seconds])

    @overload
    def ask(
        self,
        audio: AudioInput | Sequence[AudioInput],
        question: Question,
        stream: Literal[True],
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: object,
    ) -> Iterator[str]: ...

    @overload
    def ask(
        self,
        audio: AudioInput,
        question: str | ChatTurns,
        stream: Literal[False] = False,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: object,
    ) -> str: ...

    @overload
    def ask(
        self,
        audio: Sequence[AudioInput],
        question: ChatTurns,
        stream: Literal[False] = False,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: object,
    ) -> str: ...

    @overload
    def ask(
        self,
        audio: Sequence[AudioInput],
        question: str,
        stream: Literal[False] = False,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: object,
    ) -> str | list[str]: ...

    @overload
    def ask(
        self,
        audio: AudioInput | Sequence[AudioInput],
        question: list[str] | tuple[str, ...],
        stream: Literal[False] = False,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: object,
    ) -> list[str]: ...

    def ask(
        self,
        audio: AudioInput | Sequence[AudioInput],
        question: Question,
        stream: bool = False,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: Any,
    ) -> str | list[str] | Iterator[str]:
        """Answer questions about audio.

        Args:
            audio: a clip (a path, `(array, rate)`, another form of `pal.clips`, or an `AudioKV`), or a list of clips.
            question: a string, a list of strings, or chat turns (`[{"role", "content"}, ...]`) with
                `<audio>` where each clip stands.
            stream: yield the text of a single answer piece by piece.
            allow_urls: read clips from http, https and file URLs.
            read_to_end: read clips of unknown length, such as a WAV written to a stream, to the end of the file, with
                an `AudioWarning` for each.
            options: transformers' generation options, such as `max_new_tokens` or `do_sample`.

        Returns:
            A string for one conversation; a list of strings for a list of questions about one clip (which is encoded
            once), and for a list of clips with one question each. Several clips are in one conversation if the question
            has as many `<audio>`, or is a chat.

        Raises:
            AudioError: a clip cannot be used.
            PromptError: clips and placeholders do not match.
        """
        generation_options(options, self.tokenizer, stream)  # raise before a clip is decoded
        given = clip_list(audio)
        asked = read_question(question, len(given), self.tokenizer, self.config.style)
        clips, notes = self._read(given, allow_urls, read_to_end)
        warn_of(notes)
        if stream:
            if len(asked.tokens) != 1:
                raise PromptError("stream=True takes one conversation; ask the others one by one")
            return answering.stream(self, self.ready(clips), asked.tokens[0], **options)
        answers = answering.generate(self, self.ready(clips), asked.tokens, **options)
        return answers[0] if asked.single else answers

    @torch.inference_mode()
    def ask_detailed(
        self,
        audio: AudioInput | Sequence[AudioInput],
        question: Question,
        max_new_tokens: int = 64,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: object,
    ) -> list[DetailedAnswer]:
        """As `ask`, but returns a list of answers with audio seconds, token counts and timings."""
        all_options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **options}
        generation_options(all_options, self.tokenizer)  # raise before a clip is decoded
        given = clip_list(audio)
        asked = read_question(question, len(given), self.tokenizer, self.config.style)
        clips, notes = self._read(given, allow_urls, read_to_end)
        return answering.generate_detailed(self, clips, asked.tokens, notes, all_options)

    def _read(
        self, given: Sequence[AudioInput], allow_urls: bool, read_to_end: bool
    ) -> tuple[list[Clip], tuple[str, ...]]:
        """Clips of any input forms, and the notes on those of unknown length."""
        found = [long_clips.read(self, clip, allow_urls, read_to_end) for clip in given]
        return [clip for clip, _ in found], tuple(note for _, notes in found for note in notes)

    def ready(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips of a batch as one type; long ones are encoded."""
        return to_one_kind(clips, self.encode_clip, self.keys_values)

    # Identity

    @property
    def digest(self) -> str:
        """SHA-256 of all weights, cached until one changes; equal for equal weights from different files."""
        return self._digest.of(self.state_dict())

    def merge_adapters(self) -> None:
        """Merge LoRA adapters into their base weights, which the next bundle then holds."""
        changed = {f"llm.{name}" for name in self.llm.merge_adapters()} | adapters.merge(self)
        self.trained = {name for name in self.trained if not {"base_layer", "lora_A", "lora_B"} & set(name.split("."))}
        self.trained |= changed

    def generation_options(self) -> dict[str, Any]:
        """Default options of transformers' `generate`: greedy search, and the ids that end an answer."""
        return {"max_new_tokens": 64, **default_options(self.tokenizer, self.llm.vocab)}

    def save_pretrained(
        self,
        folder: str | Path,
        full: bool = False,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Write a bundle; see `pal.bundle.save`."""
        bundle.save(self, folder, full=full, dtype=dtype, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PalModel:
        """Read a bundle from a folder or the Hub; see `pal.bundle.load`."""
        return bundle.load(path)
