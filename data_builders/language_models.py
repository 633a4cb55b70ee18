"""Who rephrases: any server that speaks OpenAI's chat protocol, through its client, or a local Hugging Face model."""

import os
import re
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from biasunlearn_trainer.data_builders.loading import one_at_a_time
from biasunlearn_trainer.data_builders.stages import StageError

NO_KEY = "none"
"""What servers without a key are sent: the client insists on one."""
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


class NoAnswer(RuntimeError):
    """A request that was not answered for all its retries; asked again another time, it may be."""


class RefusedRequest(RuntimeError):
    """A request that the server will not answer, however often it is asked (a text that is too long)."""


class RateLimit:
    """Lets threads through at most so many times a minute, evenly spaced."""

    def __init__(self, per_minute: float):
        self._interval, self._next, self._lock = 60.0 / per_minute, 0.0, threading.Lock()

    def wait(self, *ignored: object) -> None:
        """Sleeps until this thread's turn; what an HTTP client's hook passes is ignored."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        time.sleep(turn - now)


class ServedModel:
    """A model behind an OpenAI-compatible server: vLLM, TGI, `transformers serve`, or a commercial one.

    The client retries what may pass (time-outs, lost connections, 408, 409, 429, 5xx), waiting as `Retry-After` says or
    twice as long each time. The key is read from the environment when the first request is made; no message, setting
    or file holds it.

    Args:
        model: the server's name of it.
        base_url: for instance http://localhost:8000/v1.
        api_key_env: the variable that holds the key; None where the server wants none.
        timeout: seconds for an answer.
        retries: how often a request is tried again.
        requests_per_minute: at most, retries counted; None: no limit.
        max_tokens: of an answer.

    Raises:
        ValueError: a URL or a variable's name that cannot be one; the value is not repeated, it may be a secret.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        requests_per_minute: float | None = None,
        max_tokens: int = 256,
    ):
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("`base_url` must be like http://localhost:8000/v1")
        if url.username or url.password:
            raise ValueError(
                "`base_url` holds a user or password; name the variable of the key in `api_key_env` instead"
            )
        if api_key_env is not None and not _VARIABLE.fullmatch(api_key_env):
            raise ValueError("`api_key_env` must be the name of an environment variable, not the key itself")
        self._base_url, self._key_env, self._timeout, self._retries = base_url, api_key_env, timeout, retries
        self._limit = None if requests_per_minute is None else RateLimit(requests_per_minute)
        self._request = {"model": model, "max_tokens": max_tokens}
        self._client, self._lock = None, threading.Lock()

    def _key(self) -> str:
        key = NO_KEY if self._key_env is None else os.environ.get(self._key_env, "").strip()
        if not key:
            raise StageError(
                f"the environment variable {self._key_env} is not set; export the key of {self._base_url}."
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise StageError(f"the environment variable {self._key_env} holds something that cannot be a key.")
        return key

    def _opened(self):
        from openai import DefaultHttpxClient, OpenAI

        with self._lock:
            if self._client is None:
                hooks = {"request": [self._limit.wait]} if self._limit else {}
                http = DefaultHttpxClient(timeout=self._timeout, event_hooks=hooks)
                self._client = OpenAI(
                    api_key=self._key(),
                    base_url=self._base_url,
                    timeout=self._timeout,
                    max_retries=self._retries,
                    http_client=http,
                )
        return self._client

    def ask(self, texts: Sequence[str], temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Answers one text.

        Args:
            texts: holds it alone.
            temperature: of sampling; 0 for greedy decoding.
            seed: sent along; servers that know it answer alike.

        Raises:
            NoAnswer: there was none, after all retries.
            RefusedRequest: there will be none.
            StageError: the key is refused, or the server has no such model.
        """
        (text,) = texts
        return [self._ask(text, {"temperature": temperature, "seed": seed})]

    def _ask(self, text: str, drawing: dict[str, float]) -> str:
        """The answer; errors carry no cause, since a server's own words may repeat the key."""
        import openai

        client = self._opened()
        try:
            messages = [{"role": "user", "content": text}]
            answer = client.chat.completions.create(messages=messages, **self._request, **drawing)
            # A body that is no JSON comes as text, JSON of another form without choices.
            content = answer.choices[0].message.content
            fault = None if content is None or isinstance(content, str) else "garbage"
        except (openai.AuthenticationError, openai.PermissionDeniedError) as err:
            where = f"the key in {self._key_env}" if self._key_env else "a request without a key (set `api_key_env`)"
            raise StageError(f"{self._base_url} refused {where}: {err.status_code}.") from None
        except openai.NotFoundError as err:
            raise StageError(f"{self._base_url} has no such model or path: {self._said(err)}") from None
        except (openai.RateLimitError, openai.InternalServerError, openai.ConflictError) as err:
            raise NoAnswer(f"status {err.status_code}") from None
        except openai.APIStatusError as err:
            if err.status_code == 408:
                raise NoAnswer("status 408") from None
            raise RefusedRequest(f"status {err.status_code}: {self._said(err)}") from None
        except openai.APITimeoutError:
            raise NoAnswer(f"time-out after {self._timeout:g} s") from None
        except openai.APIConnectionError:
            raise NoAnswer("no connection") from None
        except (openai.APIError, ValueError, AttributeError, TypeError, IndexError, LookupError):
            fault = "garbage"
        if fault:
            raise NoAnswer("the server's answer is not OpenAI's protocol")
        return content or ""

    def _said(self, err: Exception) -> str:
        """A server's words without the key."""
        said = str(getattr(err, "message", err))[:300]
        key = os.environ.get(self._key_env or "", "").strip()
        return said.replace(key, "***") if key else said

    def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None


class LocalModel:
    """A causal language model of Hugging Face in this process.

    Args:
        model: a path or Hub id; where its tokenizer has a chat template, the text is a user's message.
        device: where it runs; None: the first accelerator, else the CPU.
        max_tokens: of an answer.
    """

    def __init__(self, model: str, device: str | None = None, max_tokens: int = 256):
        self._name, self._device, self._max_tokens = model, device, max_tokens
        self._model = self._tokenizer = None

    @one_at_a_time
    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._device is None:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self._device = str(accelerator or "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(self._name, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # From safetensors alone: a pickle could run anything.
        model = AutoModelForCausalLM.from_pretrained(self._name, dtype="auto", use_safetensors=True)
        self._model = model.to(self._device).eval()

    def ask(self, texts: Sequence[str], temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Answers a batch of texts.

        Args:
            texts: the batch.
            temperature: of sampling; 0 for greedy decoding.
            seed: of sampling; with the texts of a batch it decides what is drawn.
        """
        import torch

        if self._model is None:
            self._load()
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
                )
                for text in texts
            ]
        batch = tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template
        ).to(self._device)
        batch.pop("token_type_ids", None)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)
            ids = self._model.generate(
                **batch, **sampling, max_new_tokens=self._max_tokens, pad_token_id=tokenizer.pad_token_id
            )
        answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def close(self) -> None:
        """Lets the weights go."""
        self._model = self._tokenizer = None
