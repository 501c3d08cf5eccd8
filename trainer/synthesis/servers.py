"""Completions of an endpoint: requests run in a thread, each answer is written to the journal as soon as it comes."""

import asyncio
import logging
import queue
import threading
from collections.abc import Iterator, Sequence

from rekatrain.data.errors import InputError, TrainingStopped
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Endpoint
from rekatrain.trainer.synthesis.config import ServerConfig, SynthesisConfig
from rekatrain.trainer.synthesis.journal import Journal
from rekatrain.trainer.synthesis.replies import PATHS, make_body, read_reply
from rekatrain.trainer.synthesis.requests import Question, missing, seed_of

logger = logging.getLogger(__name__)

# Failed requests, beyond their retries and without an answer between them, after which the server counts as lost.
MAX_FAILURES = 16


def make_endpoint(server: ServerConfig, base_urls: list[str] | None = None) -> Endpoint:
    """Return the endpoint of a server, or of equal ones at `base_urls`; raise InputError for a wrong address or key."""
    return Endpoint(
        base_urls or server.base_url,
        api_key_env=server.api_key_env,
        concurrency=server.concurrency,
        request_timeout=server.request_timeout,
        max_retries=server.max_retries,
    )


class ServerAnswers:
    """Asks a server for the missing completions; iterating yields the questions that got all they can get.

    num_failed: requests that failed so far; the next start sends them again
    """

    def __init__(
        self,
        config: SynthesisConfig,
        server: ServerConfig,
        questions: Sequence[Question],
        journal: Journal,
        *,
        seed: int,
    ) -> None:
        """Check the address and the key; nothing is sent."""
        self._config, self._server, self._journal, self._seed = config, server, journal, seed
        self._endpoint = make_endpoint(server)
        self._questions = questions
        self._done: queue.Queue[Question | BaseException | None] = queue.Queue()
        self._has_answered, self._failures_in_a_row = False, 0
        self.num_failed = 0

    def __iter__(self) -> Iterator[list[Question]]:
        threading.Thread(target=self._run, daemon=True).start()
        while (done := self._done.get()) is not None:
            if isinstance(done, BaseException):
                raise done
            yield [done]

    def _run(self) -> None:
        try:
            asyncio.run(self._ask_all())
            self._done.put(None)
        except BaseException as error:  # it is raised by the iteration, in the main thread
            self._done.put(error)

    async def _ask_all(self) -> None:
        num_generations = self._config.num_generations
        left = {asked.name: missing(asked, num_generations, self._journal) for asked in self._questions}
        waiting = {name: len(indices) for name, indices in left.items()}
        jobs = iter([(question, index) for question in self._questions for index in left[question.name]])

        async with self._endpoint.connect() as post:

            async def work() -> None:
                for question, index in jobs:
                    body = make_body(question, self._server, self._config, seed_of(self._seed, question, index))
                    reply = await post(PATHS[self._server.format], body)
                    try:
                        if isinstance(reply, RewardError):
                            raise reply
                        self._journal.add_answer((question.name, index), read_reply(reply, self._server))
                        self._has_answered, self._failures_in_a_row = True, 0
                    except RewardError as error:
                        self._count_failure(error)
                    waiting[question.name] -= 1
                    if waiting[question.name] == 0:
                        self._done.put(question)

            workers = [asyncio.create_task(work()) for _ in range(self._server.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    def _count_failure(self, error: RewardError) -> None:
        """Count a request that failed; raise where the server is wrong, or gone."""
        self.num_failed += 1
        self._failures_in_a_row += 1
        if not self._has_answered and self._failures_in_a_row >= min(MAX_FAILURES, self._server.concurrency):
            raise InputError(f"the server answers no request: {error}")
        if self._failures_in_a_row >= MAX_FAILURES:
            raise TrainingStopped(
                f"{MAX_FAILURES} requests in a row have failed, the last: {error}; all answers so far are kept: start "
                "the command again to go on"
            )
        if self.num_failed == 1:
            logger.warning("a request has failed, and is sent again at the next start: %s", error)
