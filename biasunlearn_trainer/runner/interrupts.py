"""Ctrl-C and SIGTERM in training: finish the step, write a checkpoint, leave with the usual exit status."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_PRESS_SECONDS = 1.0
"""Under a launcher one Ctrl-C arrives twice: from the terminal, and from the launcher that passes it on."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and did.

    Args:
        number: of the signal.
        message: where the run stands.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + number


class Interrupts(TrainerCallback):
    """Turns the first signal into a checkpoint at the end of the step; the second one stops at once.

    Every process asks all others after each step, so that all stop after the same one.
    """

    def __init__(self):
        self._received: int | None = None
        self._since = 0.0
        self._stopping: int | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals wait for the end of the step; afterwards they act as before.

        Raises:
            Interrupted: at the end, where one came after the last step.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._received is not None:
            raise Interrupted(self._received, "Interrupted when the training was over.")

    def _receive(self, number: int, frame: object) -> None:
        if self._received is None:
            self._received, self._since = number, time.monotonic()
            said = b"Interrupted: finishing the step and saving. Once more stops at once, without a checkpoint.\n"
            os.write(2, said)  # print may be in the middle of a line of its own
        elif time.monotonic() - self._since > ONE_PRESS_SECONDS:
            raise Interrupted(number, "Interrupted at once; what was not saved is lost.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Saves and stops where any process was asked to."""
        number = self._received or 0
        if torch.distributed.is_initialized():
            asked = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            number = int(asked)
        if number:
            self._stopping = number
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Leaves the training before the best weights are put in the place of the last ones."""
        if self._stopping is not None:
            raise Interrupted(
                self._stopping,
                f"Interrupted after step {state.global_step} of {state.max_steps}, which is saved.",
            )
