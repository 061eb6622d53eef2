"""`PalProcessor`: chats and clips to tensors, and generated ids to text."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from pal import source_tokenizer
from pal.clips import AudioInput, clip_list, clip_notes, read_waveform, warn_of
from pal.data import prompts
from pal.data.manifest import PLACEHOLDER
from pal.data.prompts import PromptStyle
from pal.errors import ConfigError, PromptError
from pal.files import MANIFEST, amend, verify
from pal.hf.chats import read_chat
from pal.hf.config import PalConfig
from pal.hf.inputs import stack_prompts
from pal.hf.loading import HUB
from pal.types import AUDIO, IGNORE, Tokens

if TYPE_CHECKING:
    from pal.data.prompts import Conversation
    from pal.model import PalModel

_PROCESSOR_FILES = (".json", ".jinja", ".txt", ".model")
"""Endings of the names of files that a processor reads; weights are checked when the model is loaded."""
_IGNORED = {"images_kwargs", "videos_kwargs", "common_kwargs", "return_mm_token_type_ids"}
"""Options of other processors that have no effect here."""


class PalInputs(BatchFeature):
    """Tensors of a processor; `to` keeps waveforms in float32 when it converts the others to half precision."""

    def to(self, *args: Any, **kwargs: Any) -> PalInputs:
        """As in transformers."""
        waveforms = self.data.get("input_values")
        super().to(*args, **kwargs)
        if isinstance(waveforms, Tensor):
            self.data["input_values"] = waveforms.to(self.data["input_ids"].device)
        return self


class PalProcessor(ProcessorMixin):
    """Processor of `PalForConditionalGeneration`. It never truncates anything, neither text nor audio.

    Attributes:
        sampling_rate: Hz of the waveforms that the model takes.
        system: system prompt, for conversations without one.
        after_clip: text between a clip and what follows it in its message.
        allow_urls: True to fetch clips from http, https and file URLs. It is never saved.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        sampling_rate: int = 16_000,
        system: str | None = None,
        after_clip: str = "\n",  # as in folders of earlier versions, which do not say
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.sampling_rate = sampling_rate
        self.system = system
        self.after_clip = after_clip
        self.allow_urls = False

    @classmethod
    def of(cls, model: PalModel) -> PalProcessor:
        """Processor of a model."""
        template = getattr(model.tokenizer, "chat_template", None)
        return cls(model.tokenizer, template, model.sampling_rate, model.config.system, model.config.after_clip)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        allow_urls: bool = False,
        other_weights: bool = False,
        **kwargs: Any,
    ) -> PalProcessor:
        """Load a processor from a bundle, a folder that `save_pretrained` wrote, or the Hub.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args: as in transformers.
            allow_urls: fetch clips from URLs.
            other_weights: take the tokenizer of the LLM's source also where it is not that of then.
            kwargs: transformers' options.

        Raises:
            BundleError: a file of a bundle has changed.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / MANIFEST).is_file():
            verify(folder, _PROCESSOR_FILES)
        processor = cls._with_source_tokenizer(pretrained_model_name_or_path, other_weights, kwargs)
        if processor is None:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.allow_urls = allow_urls
        return processor

    @classmethod
    def _with_source_tokenizer(
        cls, source: str | Path, other_weights: bool, kwargs: dict[str, Any]
    ) -> PalProcessor | None:
        """The processor of a bundle that leaves its tokenizer out; None for others."""
        hub = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
        try:
            entry = PalConfig.get_config_dict(source, **hub)[0].get("tokenizer")
        except OSError:  # a processor saved without a model
            return None
        if not isinstance(entry, dict):
            return None
        tokenizer = source_tokenizer.load(entry, source, other_weights)
        options, _ = cls.get_processor_dict(str(source), **hub)
        options["chat_template"] = getattr(tokenizer, "chat_template", None)
        given = {name: value for name, value in kwargs.items() if name not in {*HUB, "trust_remote_code"}}
        made: PalProcessor = cls.from_args_and_dict([tokenizer], options, **given)
        return made

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the processor to a folder; if that is a bundle, update its `manifest.json`, too.

        A bundle that leaves its LLM's tokenizer out still does if this is the same, else it has this one from now on.
        """
        folder = Path(save_directory)
        if push_to_hub:
            raise ConfigError("a processor is uploaded with its model: model.push_to_hub(...), or pal push")
        if not (folder / MANIFEST).is_file():
            files: list[str] = super().save_pretrained(str(folder), **kwargs)
            return files
        with tempfile.TemporaryDirectory() as scratch:
            super().save_pretrained(scratch, **kwargs)
            contents = {str(p.relative_to(scratch)): p.read_bytes() for p in Path(scratch).rglob("*") if p.is_file()}
        config = json.loads((folder / "config.json").read_text())
        entry = config.get("tokenizer")
        if entry:
            same = source_tokenizer.digest(self.tokenizer) == entry["digest"]
            if same and self.chat_template == getattr(self.tokenizer, "chat_template", None):
                contents = {name: data for name, data in contents.items() if name == "processor_config.json"}
            else:
                contents["config.json"] = (json.dumps({**config, "tokenizer": None}, indent=1) + "\n").encode()
        amend(folder, contents)
        return [str(folder / name) for name in contents]

    # To tensors

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: AudioInput | Sequence[AudioInput] | Sequence[Sequence[AudioInput]] | None = None,
        images: Any = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> PalInputs:
        """Convert prompts, with `<audio>` as the placeholder of each clip, and clips to tensors.

        Args:
            text: one prompt or several, used as they are; `apply_chat_template` is for chats.
            audio: one clip, a list of clips in the order of their placeholders, or one such list for each prompt.
                A clip is in any of the forms of `pal.clips`; a bare array is at `sampling_rate`.
            images: not supported.
            videos: not supported.
            kwargs: `sampling_rate` of bare arrays, `padding`, `padding_side`, `max_length` (smallest width, with
                `padding="max_length"`), `return_tensors` ("pt" or "np"), `allow_urls`, `read_to_end` (use all samples
                of a clip whose length cannot be checked, with an `AudioWarning`).

        Raises:
            PromptError: numbers of clips and placeholders differ, or something would have to be truncated.
            AudioError: a clip cannot be used.
        """
        if images is not None or videos is not None:
            raise PromptError("the model takes text and audio only; leave images and videos out")
        if text is None:
            raise PromptError(f"no text; give a prompt with {PLACEHOLDER} in place of each clip")
        texts = [text] if isinstance(text, str) else list(text)
        clips = _flat(audio)
        conversations: list[Tokens] = []
        for part, count in zip(texts, _clips_of_texts(texts, len(clips)), strict=True):
            first = sum(len(one.clips) for one in conversations)
            conversations.append(prompts.encode_text(self.tokenizer, part, list(range(first, first + count))))
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
        """Render one chat or several as text, or with `tokenize=True, return_dict=True` as the model's inputs.

        Args:
            conversation: messages with `role` and `content`, a string or a list of parts as in `pal.hf.chats`; or a
                list of such chats.
            chat_template: replaces the tokenizer's.
            add_generation_prompt: end with the tokens that begin an answer.
            continue_final_message: not supported.
            tokenize: return ids instead of text.
            return_dict: return all tensors instead of ids only.
            return_tensors: "pt" or "np".
            return_assistant_tokens_mask: add `assistant_masks`, 1 for the tokens of answers, end of turn included.
            processor_kwargs: options of `__call__`.
            audio: the clips, if the messages contain placeholders only.
            kwargs: options of `__call__`, too.

        Raises:
            PromptError: numbers of clips and placeholders differ, or the messages are invalid.
            AudioError: a clip cannot be used.
        """
        if continue_final_message:
            raise PromptError("continue_final_message is not supported; end the chat with a question")
        if isinstance(conversation, Mapping):
            raise PromptError("a chat is a list of messages with 'role' and 'content', not a dict; give that list")
        if kwargs.pop("tools", None) or kwargs.pop("documents", None):
            raise PromptError("tools and documents are not supported; write them into a message")
        options = {**kwargs, **(processor_kwargs or {}), "return_tensors": return_tensors}
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        tokenizer = self._tokenizer(chat_template)
        style = PromptStyle(self.system, self.after_clip)
        talks = [read_chat(messages, style) for messages in (conversation if batched else [conversation])]
        if not tokenize:
            texts = [prompts.render(tokenizer, talk, add_generation_prompt) for talk, _ in talks]
            return texts if batched else texts[0]
        in_parts = [source for _, sources in talks for source in sources]
        bare = [source is None for source in in_parts]
        clips = _flat(audio)
        if not all(bare) if clips else any(bare):
            raise PromptError(
                f"{bare.count(False)} of {len(in_parts)} audio parts hold a clip, and audio= gives {len(clips)}; "
                "put all clips into the parts, or all into audio="
            )
        clips = clips or in_parts
        counts = _clips_of_texts([" ".join(turn["content"] for turn in talk) for talk, _ in talks], len(clips))
        conversations: list[Tokens] = []
        for (talk, _), count in zip(talks, counts, strict=True):
            first = sum(len(one.clips) for one in conversations)
            conversations.append(_encode(tokenizer, talk, list(range(first, first + count)), add_generation_prompt))
        inputs = self._tensors(conversations, clips, options, with_answer_mask=return_assistant_tokens_mask)
        return inputs if return_dict else inputs["input_ids"]

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
        with_answer_mask: bool = False,
    ) -> PalInputs:
        """Tensors of conversations and clips. `options` of `__call__`, also nested in `text_kwargs`, `audio_kwargs`."""
        given = {name: value for name, value in options.items() if name not in _IGNORED}
        given |= {**given.pop("text_kwargs", {}), **given.pop("audio_kwargs", {})}
        kind = given.pop("return_tensors", None) or "pt"
        kind = "pt" if kind == "auto" else str(getattr(kind, "value", kind))
        side = given.pop("padding_side", None) or "left"
        padding, width = given.pop("padding", True), given.pop("max_length", None)
        if given.pop("truncation", None):
            raise PromptError(
                "truncation is not supported, since it changes the answer; shorten the conversation yourself"
            )
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
            raise PromptError(
                f"a conversation has more than max_length {width} ids and is never truncated; raise max_length"
            )
        reading: dict[str, Any] = {"source_rate": source_rate, "allow_urls": allow_urls, "read_to_end": read_to_end}
        read = [read_waveform(clip, self.sampling_rate, **reading) for clip in clips]
        warn_of(clip_notes(read))
        waves = [wave.samples_N for wave in read]
        ids_BT, mask_BT = stack_prompts(conversations, self._pad(), side, width)
        data = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if with_answer_mask:
            data["assistant_masks"] = _answer_mask(conversations, mask_BT)
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
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_values", "audio_lengths"]

    # To text

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Decode ids with the tokenizer, placeholders of clips left out; a list of texts if there are rows of ids."""
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
        """Decode generated ids; transformers' pipelines call this."""
        kwargs.pop("generation_mode", None)
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _encode(tokenizer: Any, talk: Conversation, clips: list[int], add_generation_prompt: bool) -> Tokens:
    last = talk[-1]["role"]
    if add_generation_prompt and last == "user":
        return prompts.encode(tokenizer, talk, clips)
    if not add_generation_prompt and last == "assistant":
        return prompts.encode(tokenizer, talk, clips, train=True)
    return prompts.encode_as_is(tokenizer, talk, clips, add_generation_prompt)


def _answer_mask(conversations: Sequence[Tokens], mask_BT: Tensor) -> Tensor:
    """1 for the tokens of answers: [B, T]."""
    answers_BT = torch.zeros_like(mask_BT)
    for b, conversation in enumerate(conversations):
        if conversation.labels is None:
            raise PromptError(
                "assistant_masks needs chats that end with an answer; add it, or leave return_assistant_tokens_mask out"
            )
        answers_BT[b, mask_BT[b] != 0] = torch.tensor([int(label != IGNORE) for label in conversation.labels])
    return answers_BT


def _flat(audio: AudioInput | Sequence[AudioInput] | Sequence[Sequence[AudioInput]] | None) -> list[AudioInput]:
    """All clips in one list, given one clip, a list of clips, or a list for each prompt."""
    given: Any = audio
    return [] if audio is None else [clip for part in clip_list(given) for clip in clip_list(part)]


def _clips_of_texts(texts: Sequence[str], clips: int) -> list[int]:
    """Number of clips of each text; `clips` is the number of all.

    Raises:
        PromptError: the texts have another number of placeholders.
    """
    counts = [text.count(PLACEHOLDER) for text in texts]
    if sum(counts) != clips:
        raise PromptError(
            f"{clips} clips but {sum(counts)} '{PLACEHOLDER}' placeholders; give a clip for each, in their order"
        )
    return counts
