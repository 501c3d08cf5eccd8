"""Servers that may be away: the choice of the next one, the time of retries, and the end of the run."""

import logging
import time
from collections.abc import Sequence

from tenacity import RetryCallState, wait_random_exponential

from rekatrain.data.errors import TrainingStopped
from rekatrain.rewards.errors import RewardError

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0
# Seconds between two attempts of a request during an outage, so that a server which is back is soon found.
LONGEST_OUTAGE_WAIT = 10.0
# Seconds for which a server that was away is passed over, where there are others.
PASSED_OVER_SECONDS = 10.0
_BACK_OFF = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)


class TransientError(RewardError):
    """A failure that may be over at the next attempt.

    wait:    seconds of the server's Retry-After
    is_away: True if the server itself did not answer
    """

    def __init__(self, message: str, wait: float = 0.0, *, is_away: bool = False) -> None:
        super().__init__(message)
        self.wait, self.is_away = wait, is_away


class ServerAway(TrainingStopped):
    """No server of a reward has answered for its `outage_timeout`; `cause` names the outage in a few words."""

    def __init__(self, urls: str, minutes: float, reason: str) -> None:
        self.cause = f"an outage: {urls} has been away for {minutes:g} minutes (outage_timeout)"
        super().__init__(f"{self.cause}: {reason}. Start the server again, or raise outage_timeout")


class Servers:
    """The servers of one reward, which give equal answers.

    urls:           of the servers
    outage_seconds: time without any server after which the run gives up; 0: an outage is an error of each completion
    """

    def __init__(self, urls: Sequence[str], *, outage_seconds: float) -> None:
        self.urls, self.outage_seconds = list(urls), outage_seconds
        self._number = -1
        self._away_until = dict.fromkeys(self.urls, 0.0)
        self._away_since: float | None = None
        self.answered_at = -1.0
        self._is_reported = False

    def choose(self) -> str:
        """Return the server for the next attempt: the next in turn that is there, else the one away for longest."""
        now = time.monotonic()
        for _ in self.urls:
            self._number = (self._number + 1) % len(self.urls)
            if self._away_until[self.urls[self._number]] <= now:
                return self.urls[self._number]
        return min(self.urls, key=lambda url: self._away_until[url])

    @property
    def has_others(self) -> bool:
        """True if a server is there that has not just failed."""
        return any(until <= time.monotonic() for until in self._away_until.values())

    def answered(self, url: str) -> None:
        """Note that a server has answered, whatever it said."""
        self._away_until[url] = 0.0
        self.answered_at = time.monotonic()
        if self._is_reported and self._away_since is not None:
            logger.warning("%s is back after %.0f s", url, self.answered_at - self._away_since)
        self._away_since, self._is_reported = None, False

    def failed(self, url: str, error: TransientError) -> None:
        """Note that an attempt has failed."""
        if not error.is_away:
            self.answered(url)
            return
        now = time.monotonic()
        self._away_until[url] = now + PASSED_OVER_SECONDS
        if self._away_since is None:
            self._away_since = now

    def wait_for(self, error: TransientError) -> None:
        """Return if the outage may go on, and log it once; raise ServerAway if it has lasted too long."""
        assert self._away_since is not None
        if time.monotonic() - self._away_since > self.outage_seconds:
            raise ServerAway(", ".join(self.urls), self.outage_seconds / 60, str(error))
        if not self._is_reported:
            self._is_reported = True
            logger.warning(
                "%s: the step waits and asks again, for up to %g minutes (outage_timeout)",
                error,
                self.outage_seconds / 60,
            )


class Request:
    """The attempts of one request, for tenacity."""

    def __init__(self, servers: Servers, max_retries: int) -> None:
        self._servers, self._max_retries = servers, max_retries
        self._failed_at: float | None = None

    def is_given_up(self, state: RetryCallState) -> bool:
        """Return True after the last attempt: beyond the retries, a request waits only while no server is there.

        A server that has answered others since the first failure is there: the request itself is what fails.
        """
        error = state.outcome.exception() if state.outcome else None
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
        if state.attempt_number <= self._max_retries:
            return False
        is_away = isinstance(error, TransientError) and error.is_away and self._servers.outage_seconds > 0
        if not is_away or self._servers.answered_at > self._failed_at:
            return True
        assert isinstance(error, TransientError)
        self._servers.wait_for(error)
        return False

    def seconds_to_wait(self, state: RetryCallState) -> float:
        """Return the pause before the next attempt: none if another server is there."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, TransientError):
            return 0.0
        if error.is_away and self._servers.has_others:
            return 0.0
        wait = max(min(error.wait, LONGEST_WAIT), _BACK_OFF(state))
        return min(wait, LONGEST_OUTAGE_WAIT) if state.attempt_number > self._max_retries else wait
