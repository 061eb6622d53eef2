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
        """Token ids and clips of questions and rewritten answers that were read so far."""
        self._session: Session | None = None
        self._read: list[int] = []
        """Token ids in the session, -1 for a clip."""
        self._marks: dict[int, SessionMark] = {}
        """Moments of the session, by the number of ids before them."""

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
        if session is None:
            self._session = None
            return answering.generate(self.model, clips, [asked], **options)[0]
        self._session = session
        start = self._go_back(session, asked.ids)
        heard = asked.ids[:start].count(AUDIO)
        logits_1V = None
        end = len(asked.ids)
        places = [at for at in range(start, end) if asked.ids[at] == AUDIO]
        for place in [*places, end]:
            if place > start:
                logits_1V = session.read(asked.ids[start:place])
                self._mark(session, asked.ids[:place])
            if place < end:
                clip = clips[heard].streams[0]
                session.begin_clip()
                (session.hear if clip.lengths[0] < answering.LONG_TOKENS else session.hear_stored)(clip)
                heard += 1
                start = place + 1
                self._mark(session, asked.ids[:start])
        assert logits_1V is not None, "a chat template ends with text"
        said_1N = session.generate(logits_1V, **options)
        self._read = [*asked.ids, *said_1N[0, :-1].tolist()]  # the last was not read
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

    def _go_back(self, session: Session, ids: list[int]) -> int:
        """Forget what does not agree with the ids; the number of ids that remain, always fewer than all."""
        same = next((at for at, pair in enumerate(zip(self._read, ids, strict=False)) if pair[0] != pair[1]), None)
        agreed = min(len(self._read), len(ids)) if same is None else same
        # the last id is read again, since it gives the logits
        start = max(at for at in self._marks if at <= min(agreed, len(ids) - 1))
        session.back_to(self._marks[start])
        self._marks = {at: mark for at, mark in self._marks.items() if at <= start}
        self._read = ids[:start]
        return start

    def _mark(self, session: Session, ids: list[int]) -> None:
        self.reads += len(ids) - len(self._read)
        self._read = ids
        self._marks[len(ids)] = session.mark()
