"""A build in several processes, one a device: they share the pictures to draw, and the first does the rest.

    accelerate launch --num_processes 4 -m biasunlearn_trainer.data_builders.build RECIPE.yaml
    torchrun --nproc_per_node 2 -m biasunlearn_trainer.data_builders.build RECIPE.yaml         # on CPUs, too

Stage by stage, the main process sends rows as far as the stage and lists those whose outcome is not stored; each
process takes every n-th batch of the list and stores what it draws in a file of its own; the main process takes those
files into the stage's store. Then it builds as it would alone, with everything there. What a killed process stored is
taken in by the next build, of however many processes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from biasunlearn_trainer.data_builders.stages import (
    ItemStage,
    Stage,
    ask_for,
    open_store,
    pending_rows,
    run_stages,
    stage_id,
)

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: nccl's ten minutes are over long before a large share is drawn."""
PENDING = ".pending"


class Processes:
    """The processes of this launch.

    Attributes:
        count: how many there are; 1 without a launcher.
        rank: the number of this one, from 0.

    Raises:
        RuntimeError: they do not find each other.
    """

    def __init__(self):
        self.count, self.rank, self._state = int(os.environ.get("WORLD_SIZE", 1)), 0, None
        if self.count > 1:
            import torch
            from accelerate import PartialState

            # Without `cpu`, accelerate takes launched processes on a machine without accelerators for single ones.
            self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
            self.rank = self._state.process_index
            if self._state.num_processes != self.count:
                raise RuntimeError(
                    f"{self.count} processes were launched, and accelerate finds {self._state.num_processes}; each "
                    "would draw everything. Launch them with `accelerate launch` or `torchrun`."
                )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reads, writes and says everything."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """Ends what the processes have in common."""
        if self._state is not None:
            self._state.destroy_process_group()


def is_shared(stage: Stage) -> bool:
    """Whether processes share a stage's items."""
    return isinstance(stage, ItemStage) and getattr(stage, "is_shared", False)


def share(
    processes: Processes, stages: Sequence[Stage], folder: Path, rows: Callable[[], Iterable[dict]] | None = None
) -> None:
    """Draws what is not stored yet, every process its share; each process has to call it.

    Args:
        processes: of this launch.
        stages: of the build, in order.
        folder: of the stores, the same for all processes.
        rows: reads the sources; needed in the main process alone.
    """
    for number, stage in enumerate(stages):
        if not is_shared(stage):
            continue
        pending = folder / f"{stage_id(stage)}.{number}{PENDING}"
        if processes.is_main:
            reach = run_stages(rows(), stages[:number], folder, lambda reject: None)
            folder.mkdir(parents=True, exist_ok=True)
            with open(pending, "w", encoding="utf-8") as file:
                lines = (json.dumps(row, ensure_ascii=False) for row in pending_rows(reach, stage, folder))
                file.writelines(f"{line}\n" for line in lines)
        processes.wait()
        ask_for(_share_of(pending, stage, processes), stage, folder, f"rank{processes.rank}")
        processes.wait()
        if processes.is_main:
            pending.unlink()
            open_store(stage, folder).close()


def _share_of(pending: Path, stage: ItemStage, processes: Processes) -> Iterator[dict[str, Any]]:
    """Whole batches, so that a picture is drawn beside the same others whatever the number of processes."""
    from tqdm.auto import tqdm

    size = getattr(stage, "batch_size", 1)
    title = f"{stage.name} (process 1 of {processes.count})"
    with open(pending, encoding="utf-8") as lines:
        own = (line for number, line in enumerate(lines) if number // size % processes.count == processes.rank)
        yield from map(json.loads, tqdm(own, desc=title, unit=" rows", disable=None if processes.is_main else True))
