"""What a scheduler counts: one table of names, kinds and meanings."""

from __future__ import annotations

import threading

from v4export.serve.answer import Answer

COUNTER, GAUGE = "counter", "gauge"
#: Name -> kind, and what it says. Times are sums; divided by their counts, or rates by rates, they are means.
MEASURES = {
    "prompt_tokens": (COUNTER, "Tokens of prompts that were read"),
    "new_tokens": (COUNTER, "Tokens that were generated"),
    "thoughts": (COUNTER, "Thoughts ahead of tokens"),
    "drafted_tokens": (COUNTER, "Tokens that were drafted"),
    "accepted_tokens": (COUNTER, "Drafted tokens that the model would have chosen itself"),
    "first_tokens": (COUNTER, "Answers that have begun"),
    "first_token_seconds": (COUNTER, "Time from requests to their first tokens, added up"),
    "token_intervals": (COUNTER, "Tokens of answers that have ended, without the first ones"),
    "token_interval_seconds": (COUNTER, "Time between the first and the last tokens of answers that have ended"),
    "queue_seconds": (COUNTER, "Time that requests have waited to be read, added up"),
    "replayed_steps": (COUNTER, "Steps of all sequences that TensorRT ran as CUDA graphs"),
    "finished": (COUNTER, "Answers that are complete"),
    "cancelled": (COUNTER, "Answers that nobody wanted any more"),
    "failed": (COUNTER, "Answers that have ended by an error"),
    "refused": (COUNTER, "Requests that found the queue full"),
    "waiting": (GAUGE, "Requests that wait"),
    "running": (GAUGE, "Sequences that get tokens"),
}


class Metrics:
    """Numbers by the names of ``MEASURES``; any thread may add to them."""

    def __init__(self) -> None:
        self._values = dict.fromkeys(MEASURES, 0.0)
        self._lock = threading.Lock()

    def add(self, name: str, value: float) -> None:
        """To a counter."""
        with self._lock:
            self._values[name] += value

    def set(self, name: str, value: float) -> None:
        """A gauge."""
        with self._lock:
            self._values[name] = value

    def token(self, answer: Answer) -> None:
        """Count an answer's newest token, and the answer, if it has ended well."""
        self.add("new_tokens", 1)
        if answer.count == 1:
            self.add("first_tokens", 1)
            self.add("first_token_seconds", answer.first - answer.submitted)
        if usage := answer.usage:
            self.add("finished", 1)
            self.add("token_intervals", usage.new_tokens - 1)
            self.add("token_interval_seconds", usage.decode_s)

    def values(self) -> dict[str, float]:
        """All of them now."""
        with self._lock:
            return dict(self._values)
