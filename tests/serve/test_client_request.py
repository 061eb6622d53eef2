"""Events of an engine's thread reach the event loop in order, which is woken once for many."""

import asyncio
import threading

from pal.serve.client_request import EventInbox
from pal.serve.requests import AnswerPiece


def test_many_events_wake_the_loop_once(monkeypatch):
    async def run():
        loop, wakes = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (wakes.append(1), wake(*given)))
        inbox, queues = EventInbox(), [asyncio.Queue(), asyncio.Queue()]

        def fill(first):
            for number in range(first, first + 50):
                inbox.put(queues[number % 2], AnswerPiece(0, str(number)))

        for first in (0, 50):
            thread = threading.Thread(target=fill, args=(first,))
            thread.start()
            thread.join()  # the loop does not run meanwhile
            for number in range(first, first + 50):
                assert (await queues[number % 2].get()).text == str(number)
        assert len(wakes) == 2

    asyncio.run(run())
