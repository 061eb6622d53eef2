"""`PalProcessor`: chats and clips to tensors, and ids to text."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from pal.clips import AudioInput, clip_list, clip_notes, read_waveform, warn_of
from pal.data import prompts
from pal.data.manifest import PLACEHOLDER
from pal.errors import ConfigError, PromptError
from pal.files import MANIFEST, amend, verify
from pal.hf.chats import read_chat
from pal.hf.inputs import stack_prompts
from pal.types import AUDIO, IGNORE, Tokens

if TYPE_CHECKING:
    from pal.data.prompts import Conversation
    from pal.model import PalModel

_SMALL = (".json", ".jinja", ".txt", ".model")
"""How the names of files end that a processor reads; a bundle's weights are checked by who reads them."""
_IGNORED = {"images_kwargs", "videos_kwargs", "common_kwargs", "return_mm_token_type_ids"}
"""Options of other processors that mean nothing here."""


class PalInputs(BatchFeature):
    """A processor's tensors. Moving them to a half-precision type leaves the waveforms as exact as they are."""

    def to(self, *args: Any, **kwargs: Any) -> PalInputs:
        """As in transformers."""
        exact = self.data.get("input_values")
        super().to(*args, **kwargs)
        if isinstance(exact, Tensor):
            self.data["input_values"] = exact.to(self.data["input_ids"].device)
        return self


class PalProcessor(ProcessorMixin):
    """Makes what `PalForConditionalGeneration` takes; nothing is ever cut, neither text nor audio.

    Attributes:
        sampling_rate: Hz of the waveforms the model takes.
        system: system prompt put before conversations that bring none.
        allow_urls: whether addresses of clips are fetched. It is never saved.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        sampling_rate: int = 16_000,
        system: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.sampling_rate = sampling_rate
        self.system = system
        self.allow_urls = False

    @classmethod
    def of(cls, model: PalModel) -> PalProcessor:
        """The processor of a model."""
        template = getattr(model.tokenizer, "chat_template", None)
        return cls(model.tokenizer, template, model.sampling_rate, model.config.system)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, allow_urls: bool = False, **kwargs: Any
    ) -> PalProcessor:
        """Read it from a bundle, or from a folder that `save_pretrained` wrote, or the Hub.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args: as in transformers.
            allow_urls: fetch clips by address.
            kwargs: transformers' options.

        Raises:
            BundleError: a file of a bundle has changed.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / MANIFEST).is_file():
            verify(folder, _SMALL)
        made: PalProcessor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        made.allow_urls = allow_urls
        return made

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write it; in the folder of a bundle, into its manifest, too."""
        folder = Path(save_directory)
        if push_to_hub:
            raise ConfigError("a processor is uploaded with its model: model.push_to_hub(...), or pal push")
        if not (folder / MANIFEST).is_file():
            files: list[str] = super().save_pretrained(str(folder), **kwargs)
            return files
        with tempfile.TemporaryDirectory() as scratch:
            super().save_pretrained(scratch, **kwargs)
            made = {str(p.relative_to(scratch)): p.read_bytes() for p in Path(scratch).rglob("*") if p.is_file()}
        amend(folder, made)
        return [str(folder / name) for name in made]

    # To tensors

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: AudioInput | Sequence[AudioInput] | Sequence[Sequence[AudioInput]] | None = None,
        images: Any = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> PalInputs:
        """Prompts with `<audio>` where clips stand, as they are, and the clips.

        Args:
            text: a prompt or several. Chats are made into prompts by `apply_chat_template`.
            audio: a clip, or a list of clips in the order of their places, or a list of such lists for each prompt.
                A clip is in any of the forms of `pal.clips`; a bare array is at `sampling_rate`.
            images: none.
            videos: none.
            kwargs: `sampling_rate` of bare arrays, `padding`, `padding_side`, `max_length` (at least so wide, with
                `padding="max_length"`), `return_tensors` ("pt" or "np"), `allow_urls`, `read_to_end` (clips whose end
                cannot be known are taken as far as they go, with an `AudioWarning` each).

        Raises:
            PromptError: clips and places differ in number, or something would have to be cut.
            AudioError: a clip cannot be used.
        """
        if images is not None or videos is not None:
            raise PromptError("the model takes text and audio only; leave images and videos out")
        if text is None:
            raise PromptError(f"no text; give a prompt with {PLACEHOLDER} where a clip stands")
        texts = [text] if isinstance(text, str) else list(text)
        clips = _flat(audio)
        conversations: list[Tokens] = []
        for part, count in zip(texts, _shares(texts, len(clips)), strict=True):
            placed = sum(len(one.clips) for one in conversations)
            conversations.append(prompts.encode_text(self.tokenizer, part, list(range(placed, placed + count))))
        return self._tensors(conversations, clips, kwargs)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        audio: AudioInput | Sequence[AudioInput] | Sequence[Sequence[AudioInput]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A chat or several as text, or with `tokenize=True, return_dict=True` as all the tensors the model takes.

        Args:
            conversation: messages with `role` and `content`, a string or a list of parts as in `pal.hf.chats`.
            chat_template: in place of the tokenizer's.
            add_generation_prompt: end where the answer begins.
            continue_final_message: not supported.
            tokenize: ids, not text.
            return_dict: all tensors, not the ids alone.
            return_tensors: "pt" or "np".
            return_assistant_tokens_mask: add `assistant_masks`, 1 where an answer stands with its end.
            processor_kwargs: options of `__call__`.
            audio: the clips, where the messages only mark their places.
            kwargs: options of `__call__`, too.

        Raises:
            PromptError: clips and places differ in number, or the messages are none.
            AudioError: a clip cannot be used.
        """
        if continue_final_message:
            raise PromptError("continue_final_message is not supported; end the chat with a question")
        if isinstance(conversation, Mapping):
            raise PromptError("a chat is a list of messages with 'role' and 'content', not a dict; give the list in it")
        if kwargs.pop("tools", None) or kwargs.pop("documents", None):
            raise PromptError("tools and documents are not supported; write them into a message")
        options = {**kwargs, **(processor_kwargs or {}), "return_tensors": return_tensors}
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        tokenizer = self._tokenizer(chat_template)
        talks = [read_chat(messages, self.system) for messages in (conversation if batched else [conversation])]
        if not tokenize:
            texts = [prompts.render(tokenizer, talk, add_generation_prompt) for talk, _ in talks]
            return texts if batched else texts[0]
        own = [source for _, sources in talks for source in sources]
        bare = [source is None for source in own]
        clips = _flat(audio)
        if not all(bare) if clips else any(bare):
            raise PromptError(
                f"{bare.count(False)} of {len(own)} audio parts hold a clip, and audio= gives {len(clips)}; "
                "put all clips into the parts, or all into audio="
            )
        clips = clips or own
        counts = _shares([" ".join(turn["content"] for turn in talk) for talk, _ in talks], len(clips))
        conversations: list[Tokens] = []
        for (talk, _), count in zip(talks, counts, strict=True):
            placed = sum(len(one.clips) for one in conversations)
            conversations.append(_encode(tokenizer, talk, list(range(placed, placed + count)), add_generation_prompt))
        made = self._tensors(conversations, clips, options, masks=return_assistant_tokens_mask)
        return made if return_dict else made["input_ids"]

    def _tokenizer(self, chat_template: str | None) -> Any:
        wanted = chat_template or self.chat_template
        if wanted is None or wanted == getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer
        other = copy.copy(self.tokenizer)
        other.chat_template = wanted
        return other

    def _tensors(
        self,
        conversations: list[Tokens],
        clips: Sequence[AudioInput],
        options: Mapping[str, Any],
        masks: bool = False,
    ) -> PalInputs:
        """`options` are those of `__call__`, also in transformers' groups by modality."""
        given = {name: value for name, value in options.items() if name not in _IGNORED}
        given |= {**given.pop("text_kwargs", {}), **given.pop("audio_kwargs", {})}
        kind = given.pop("return_tensors", None) or "pt"
        kind = "pt" if kind == "auto" else str(getattr(kind, "value", kind))
        side = given.pop("padding_side", None) or "left"
        padding, width = given.pop("padding", True), given.pop("max_length", None)
        if given.pop("truncation", None):
            raise PromptError("nothing is cut, since half a conversation has another answer; shorten it yourself")
        source_rate = given.pop("sampling_rate", None)
        allow_urls = bool(given.pop("allow_urls", self.allow_urls))
        read_to_end = bool(given.pop("read_to_end", False))
        unknown = [name for name, value in given.items() if value is not None]
        if unknown:
            known = "padding, padding_side, max_length, return_tensors, sampling_rate, allow_urls, read_to_end"
            raise PromptError(f"the processor does not know '{unknown[0]}'; known: {known}")
        if kind not in ("pt", "np") or side not in ("left", "right"):
            raise PromptError(f"return_tensors '{kind}', padding_side '{side}'; give pt or np, left or right")
        if padding in (False, "do_not_pad") and len({len(one.ids) for one in conversations}) > 1:
            raise PromptError("conversations of different lengths need padding; leave padding=False out")
        width = width if padding == "max_length" and width else 0
        if width and any(len(one.ids) > width for one in conversations):
            raise PromptError(f"a conversation has more than max_length {width} ids, and nothing is cut; raise it")
        reading: dict[str, Any] = {"source_rate": source_rate, "allow_urls": allow_urls, "read_to_end": read_to_end}
        read = [read_waveform(clip, self.sampling_rate, **reading) for clip in clips]
        warn_of(clip_notes(read))
        waves = [wave.samples_N for wave in read]
        ids_BT, mask_BT = stack_prompts(conversations, self._pad(), side, width)
        data = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if masks:
            data["assistant_masks"] = _answers(conversations, mask_BT)
        if waves:
            data["input_values"] = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
            data["audio_lengths"] = torch.tensor([len(wave) for wave in waves])
        if kind == "np":
            return PalInputs({name: tensor.numpy() for name, tensor in data.items()})
        return PalInputs(data)

    def _pad(self) -> int:
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return pad if pad is not None else 0

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "input_values", "audio_lengths"]

    # To text

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's, without the ids that stand for clips; of rows of ids, a list."""
        values = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(values, list) and values and isinstance(values[0], list):
            return self.batch_decode(values, *args, **kwargs)
        ids = [token for token in ([values] if isinstance(values, int) else values) if token != AUDIO]
        return self.tokenizer.decode(ids, *args, **kwargs)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """`decode` for each row."""
        return [self.decode(row, *args, **kwargs) for row in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """What transformers' pipelines call to decode."""
        kwargs.pop("generation_mode", None)
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _encode(tokenizer: Any, talk: Conversation, clips: list[int], prompt: bool) -> Tokens:
    last = talk[-1]["role"]
    if prompt and last == "user":
        return prompts.encode(tokenizer, talk, clips)
    if not prompt and last == "assistant":
        return prompts.encode(tokenizer, talk, clips, train=True)
    return prompts.encode_as_is(tokenizer, talk, clips, prompt)


def _answers(conversations: Sequence[Tokens], mask_BT: Tensor) -> Tensor:
    """1 where a trained token stands [B, T]."""
    answers_BT = torch.zeros_like(mask_BT)
    for b, conversation in enumerate(conversations):
        if conversation.labels is None:
            raise PromptError("only a chat that ends with an answer has a mask of answers")
        answers_BT[b, mask_BT[b] != 0] = torch.tensor([int(label != IGNORE) for label in conversation.labels])
    return answers_BT


def _flat(audio: AudioInput | Sequence[AudioInput] | Sequence[Sequence[AudioInput]] | None) -> list[AudioInput]:
    """Clips given alone, in a list, or in a list for each prompt."""
    given: Any = audio
    return [] if audio is None else [clip for part in clip_list(given) for clip in clip_list(part)]


def _shares(texts: Sequence[str], clips: int) -> list[int]:
    """How many of the clips belong to each text."""
    counts = [text.count(PLACEHOLDER) for text in texts]
    if sum(counts) != clips:
        raise PromptError(
            f"{clips} clips but {sum(counts)} '{PLACEHOLDER}' placeholders; give a clip for each, in their order"
        )
    return counts
