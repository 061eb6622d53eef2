"""`Chat`: a conversation with a model in which text and audio alternate, and each part is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pal import answering
from pal.answering import default_options, generation_options
from pal.backbone.audio_kv import AudioKV
from pal.backbone.session import Session, SessionMark
from pal.clips import AudioInput, clip_list, warn_of
from pal.conversations import ChatTurns, check_ids, read_question
from pal.data.prompts import user_turn
from pal.long_clips import index
from pal.types import AUDIO, Tokens

if TYPE_CHECKING:
    from pal.model import PalModel


class Chat:
    """Conversation with a model; `PalModel.chat` makes it.

    Every answer is that of `PalModel.ask` about all clips and turns so far. Where the model allows a `Session`, what
    was read stays valid when audio or text follow, so a turn costs its own rows alone; else the whole conversation is
    read again.

    Args:
        model: in evaluation mode. Its weights must not change in between.
    """

    def __init__(self, model: PalModel) -> None:
        self.model = model
        self.turns: ChatTurns = []
        """Questions and answers so far, with `<audio>` for each clip."""
        self.clips: list[AudioKV] = []
        """Clips so far."""
        self.reads = 0
        """Number of prompt tokens and clips that were run through the LLM so far; generated tokens are not counted."""
        self._session: Session | None = None
        self._read: list[int | AudioKV] = []
        """Token ids and clips in the session."""
        self._marks: dict[int, SessionMark] = {}
        """Moments of the session, by the number of ids and clips before them."""

    def ask(
        self,
        question: str,
        audio: AudioInput | Sequence[AudioInput] | None = None,
        allow_urls: bool = False,
        read_to_end: bool = False,
        **options: Any,
    ) -> str:
        """Say something, with new clips or without, and get the answer.

        If it fails, the conversation is as it was before.

        Args:
            question: what to say; new clips stand before it, or where it has `<audio>`.
            audio: a new clip or a list of new clips, as in `PalModel.ask`; None for none.
            allow_urls: as in `PalModel.ask`.
            read_to_end: as in `PalModel.ask`.
            options: transformers' generation options.

        Raises:
            AudioError: a clip cannot be used.
            PromptError: clips and placeholders do not match.
        """
        model = self.model
        options = generation_options({"max_new_tokens": 64, **options}, model.tokenizer)
        given = [] if audio is None else clip_list(audio)
        turns = [*self.turns, user_turn(question, len(given), model.config.style.after_clip)]
        (asked,) = read_question(turns, len(self.clips) + len(given), model.tokenizer, model.config.style).tokens
        check_ids([asked], model.llm.vocab, model.tokenizer)
        clips = list(self.clips)
        for clip in given:
            made, notes = index(model, clip, allow_urls, read_to_end)
            warn_of(notes)
            clips.append(made)
        answer = self._answer(asked, clips, {**default_options(model.tokenizer, model.llm.vocab), **options})
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        self.clips = clips
        return answer

    @torch.inference_mode()
    def _answer(self, asked: Tokens, clips: list[AudioKV], options: dict[str, Any]) -> str:
        session = self._session_for(clips, options)
        if session is None or asked.ids[-1] == AUDIO:
            self._session = None
            return answering.generate(self.model, clips, [asked], **options)[0]
        self._session = session
        following = iter(clips)
        whole = [next(following) if token == AUDIO else token for token in asked.ids]
        start = self._go_back(session, whole)
        end = len(whole)
        for place in [*(at for at in range(start, end) if asked.ids[at] == AUDIO), end]:
            if place > start:
                logits_1V = session.read(asked.ids[start:place])
                self._mark(session, whole[:place])
            if place < end:
                clip = clips[asked.ids[:place].count(AUDIO)].streams[0]
                session.begin_clip()
                (session.hear if clip.lengths[0] < answering.LONG_TOKENS else session.hear_stored)(clip)
                start = place + 1
                self._mark(session, whole[:start])
        said_1N = session.generate(logits_1V, **options)
        self._read = [*whole, *said_1N[0, :-1].tolist()]  # the last was not read
        self._marks[len(self._read)] = session.mark()
        text: str = self.model.tokenizer.batch_decode(said_1N, skip_special_tokens=True)[0]
        return text.strip()

    def _session_for(self, clips: list[AudioKV], options: dict[str, Any]) -> Session | None:
        """The session, or a new one; None where there can be none."""
        model, routes = self.model, self.model.integration.routes()
        if not clips or len(routes) != 1 or model.hides or not Session.answers_with(model.llm, options):
            return None
        layout = clips[0].streams[0].layout
        if not Session.suits(model.llm, layout) or any(clip.streams[0].kept_LBA is not None for clip in clips):
            return None
        if self._session is not None:
            return self._session
        session = routes[0].session(model.llm, layout)
        self._read, self._marks = [], {0: session.mark()}
        return session

    def _go_back(self, session: Session, whole: list[int | AudioKV]) -> int:
        """Forget what does not agree with a conversation; how much of it remains, always less than all."""
        agreed = 0
        for old, new in zip(self._read, whole, strict=False):
            # a clip of a turn that failed is not that of the next one
            if old is not new if isinstance(new, AudioKV) or isinstance(old, AudioKV) else old != new:
                break
            agreed += 1
        # the last id is read again, since it gives the logits
        start = max(at for at in self._marks if at <= min(agreed, len(whole) - 1))
        session.back_to(self._marks[start])
        self._marks = {at: mark for at, mark in self._marks.items() if at <= start}
        self._read = whole[:start]
        return start

    def _mark(self, session: Session, whole: list[int | AudioKV]) -> None:
        self.reads += len(whole) - len(self._read)
        self._read = whole
        self._marks[len(whole)] = session.mark()
