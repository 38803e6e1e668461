"""An OpenAI-compatible endpoint over HTTP: `POST {base_url}/chat/completions`.

httpx2 speaks HTTP, tenacity repeats what failed, aiolimiter holds the rates: one rule then covers refused
connections, 429 and 5xx as well as a 200 that holds no completion, which the `openai` client would hand on.
"""

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import httpx2 as httpx
import tenacity
from aiolimiter import AsyncLimiter

from srrl_jax.errors import InputError, check_finite
from srrl_jax.grading.cache import CachedReply, ReplyCache, request_id

_RETRIED = frozenset({408, 409, 425, 429}) | frozenset(range(500, 600))
_OF_ONE_PROMPT = frozenset({400, 413, 422})  # too long, or not to the endpoint's liking
_LONGEST_WAIT = 300.0  # seconds, whatever Retry-After says
_RESERVED = ("model", "messages", "stream", "n")


@dataclass(frozen=True)
class EndpointConfig:
    """Where an endpoint is and how it may be used.

    Attributes:
      base_url: such as "https://api.openai.com/v1".
      model: as the endpoint calls it.
      cache: SQLite file of all replies; what it holds is never asked for again.
      key_env: environment variable that holds the key; null sends none. The key is written nowhere.
      system: a system message before every prompt; null is none.
      parameters: more fields of a request, such as {temperature: 0.6, max_completion_tokens: 512}.
      concurrency: requests at one time.
      requests_per_minute, tokens_per_minute: limits; a request counts a token for every 4 characters of
        its prompt, and its max_tokens or max_completion_tokens. null is none.
      timeout: seconds of one attempt, whole.
      retries: attempts after the first.
      backoff: seconds before the first retry, about; doubles. A longer Retry-After is heeded.
      price_in, price_out: of a million prompt and completion tokens, in your currency.
    """

    base_url: str
    model: str
    cache: str
    key_env: str | None = "OPENAI_API_KEY"
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 0.5
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self)
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(
                f"base_url: must be a URL such as https://api.openai.com/v1, not {self.base_url!r}"
            )
        if url.username is not None or url.password is not None or url.query:
            # Not quoted: it may hold the key.
            raise InputError("base_url: must not hold a user, password or query; name the key in key_env")
        for key in _RESERVED:
            if key in self.parameters:
                raise InputError(f"parameters.{key}: is not yours to set here")
        for key in ("concurrency", "requests_per_minute", "tokens_per_minute"):
            if (value := getattr(self, key)) is not None and not value >= 1:
                raise InputError(f"{key}: must be at least 1, not {value}")
        if not self.timeout > 0:
            raise InputError(f"timeout: must be above 0, not {self.timeout}")
        for key in ("retries", "backoff", "price_in", "price_out"):
            if not getattr(self, key) >= 0:
                raise InputError(f"{key}: must not be negative, not {getattr(self, key)}")


class Usage(NamedTuple):
    """What was used since the start of this process.

    Attributes:
      requests, prompt_tokens, completion_tokens: answered and paid.
      cached: replies that came from the cache, for nothing.
      cost: of the paid ones, by the prices of the config.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    cost: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.requests} requests paid ({self.prompt_tokens} + {self.completion_tokens} tokens, "
            f"cost {self.cost:.4f}), {self.cached} replies from the cache"
        )


class _Failed(Exception):
    """An attempt to repeat.

    Attributes:
      pause: seconds that the endpoint asks for.
      answered: it was a 200, though not a completion.
    """

    def __init__(self, message: str, pause: float = 0.0, answered: bool = False):
        super().__init__(message)
        self.pause, self.answered = pause, answered


class _Refused(Exception):
    """This one prompt will never be answered."""


class Endpoint:
    """A context manager; its connections and rates last from one call of `ask` to the next.

    Raises:
      InputError: the environment has no key, or the cache cannot be used.
    """

    def __init__(self, config: EndpointConfig):
        self.config, self.usage = config, Usage()
        self._key = _read_key(config.key_env)
        self._cache = ReplyCache(config.cache)
        self._works = False  # whether it has ever answered
        self._refused = 0
        self._failure: Exception | None = None  # what ends the call of `ask` under way
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=config.concurrency)
        self._http = httpx.AsyncClient(headers=headers, timeout=None, limits=limits)
        self._runner = asyncio.Runner()
        self._requests, self._tokens = (
            AsyncLimiter(rate, 60) if rate else None
            for rate in (config.requests_per_minute, config.tokens_per_minute)
        )
        self._retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Failed),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(config.retries + 1), lambda _: self._failure is not None
            ),
            wait=self._pause,
            reraise=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections and closes the cache."""
        self._runner.run(self._http.aclose())
        self._runner.close()
        self._cache.close()

    def ask(
        self,
        prompts: Sequence[tuple[str, int]],
        on_reply: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[CachedReply | None]:
        """The reply to each (prompt, number of the draw); None where there will be none.

        A reply is in the cache from the moment it arrives; equal prompts and numbers share one.

        Args:
          on_reply: told replies and their total.
        Raises:
          InputError: the endpoint refuses the key or the path, or failed `retries` + 1 times in a row.
        """
        return self._runner.run(self._ask_all(prompts, on_reply))

    async def _ask_all(self, prompts, on_reply) -> list[CachedReply | None]:
        free, locks = asyncio.Semaphore(self.config.concurrency), defaultdict(asyncio.Lock)
        done, self._failure = 0, None
        system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]

        async def one(prompt: str, draw: int) -> CachedReply | None:
            nonlocal done
            messages = [*system, {"role": "user", "content": prompt}]
            body = {"model": self.config.model, "messages": messages}
            body |= self.config.parameters
            name = request_id(self.config.base_url, body, draw)
            async with free, locks[name]:
                if self._failure is not None:
                    return None
                reply = self._cache.get(name)
                if reply is None:
                    reply = await self._pay(name, body, len(prompts))
                else:
                    self._works = True
                    self.usage = self.usage._replace(cached=self.usage.cached + 1)
            done += 1
            on_reply(done, len(prompts))
            return reply

        async def until_a_failure(prompt: str, draw: int) -> CachedReply | None:
            # What is on its way when another fails is paid already: it may still arrive and be kept.
            try:
                return await one(prompt, draw)
            except Exception as error:
                self._failure = self._failure or error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(until_a_failure(*prompt)) for prompt in prompts]
        if self._failure is not None:
            raise self._failure
        return [task.result() for task in tasks]

    async def _pay(self, name: str, body: dict[str, Any], asked: int) -> CachedReply | None:
        where = f"teacher {self.config.model} at {self.config.base_url}"
        try:
            reply = await self._retry(self._attempt, json.dumps(body).encode())
        except _Refused as error:
            # Too long a prompt is one thing, a wrong model or parameter another: that refuses them all.
            self._refused += 1
            if not self._works and self._refused >= min(self.config.concurrency, asked):
                raise InputError(f"{where}: {error}; mend model or parameters") from None
            return None
        except _Failed as error:
            if error.answered and self._works:
                return None
            hint = (
                f"every reply so far is kept in {self.config.cache}: run the same command again to go on"
                if self._works
                else "check base_url (it often ends in /v1) and that the endpoint is up"
            )
            raise InputError(f"{where}: {self.config.retries + 1} attempts failed: {error}; {hint}") from None
        self._cache.put(name, reply)
        self._works = True
        u, c = self.usage, self.config
        price = (reply.prompt_tokens * c.price_in + reply.completion_tokens * c.price_out) / 1e6
        self.usage = Usage(
            u.requests + 1,
            u.prompt_tokens + reply.prompt_tokens,
            u.completion_tokens + reply.completion_tokens,
            u.cached,
            u.cost + price,
        )
        return reply

    async def _attempt(self, body: bytes) -> CachedReply:
        await self._wait_for_rate_limit(body)
        try:
            # A deadline of the whole attempt: bytes that drip in would never exceed one of a single read.
            async with asyncio.timeout(self.config.timeout):
                response = await self._http.post(
                    f"{self.config.base_url.rstrip('/')}/chat/completions", content=body
                )
        except TimeoutError:
            raise _Failed(f"no answer within {self.config.timeout:g} s") from None
        except httpx.TransportError as error:
            raise _Failed(f"{type(error).__name__} {self._clean(str(error))}".strip()) from None
        status = response.status_code
        said = f"HTTP {status}: {self._clean(' '.join(response.text.split()))[:300]}"
        if status in _RETRIED:
            raise _Failed(said, _seconds(response.headers.get("retry-after")))
        if status in _OF_ONE_PROMPT:
            raise _Refused(said)
        if status in (401, 403):
            raise InputError(
                f"teacher {self.config.model}: the key in {self.config.key_env} is refused: {said}"
            )
        if status != 200:
            raise InputError(
                f"teacher {self.config.model} at {self.config.base_url}: {said}; mend base_url or model"
            )
        return self._read(response, said)

    def _read(self, response: httpx.Response, said: str) -> CachedReply:
        try:
            data = response.json()
            message, usage = data["choices"][0]["message"], data.get("usage") or {}
            text = message["content"] or ""  # null where the limit ended a thought
            if not isinstance(text, str):
                raise TypeError
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            return CachedReply(self._clean(text), *counts)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Failed(f"no completion in {said}", answered=True) from None

    async def _wait_for_rate_limit(self, body: bytes) -> None:
        if self._requests:
            await self._requests.acquire()
        if self._tokens:
            limits = (
                self.config.parameters.get(name) or 0 for name in ("max_tokens", "max_completion_tokens")
            )
            await self._tokens.acquire(min(len(body) / 4 + max(limits), self._tokens.max_rate))

    def _pause(self, state: tenacity.RetryCallState) -> float:
        wait = tenacity.wait_random_exponential(multiplier=2 * self.config.backoff, max=60)(state)
        return max(wait, min(state.outcome.exception().pause, _LONGEST_WAIT))

    def _clean(self, text: str) -> str:
        """Without the key, which an endpoint may say back."""
        return text.replace(self._key, "[key]") if self._key else text


def _read_key(name: str | None) -> str:
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {name} is not set: put the key there, or set key_env: null"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the environment variable {name} does not hold a key: it has characters that none has"
        )
    return key


def _seconds(retry_after: str | None) -> float:
    try:
        return max(float(retry_after), 0.0)
    except (TypeError, ValueError):  # none, or a date
        return 0.0
