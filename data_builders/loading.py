"""One model is loaded at a time.

`from_pretrained` replaces functions of transformers while it loads (initial weights, tied weights) and puts them back:
of two threads, the later one puts back what the earlier one had replaced, and every model after that has weights that
nobody filled. Stages load their models in threads of their own.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

_LOADING = threading.RLock()


def one_at_a_time(load: Callable[..., Any]) -> Callable[..., Any]:
    """Has a function that loads a model wait until no other one does."""

    @functools.wraps(load)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        with _LOADING:
            return load(*args, **kwargs)

    return waiting
