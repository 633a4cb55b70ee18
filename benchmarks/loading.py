"""What reading and processing pictures takes of the process that trains, without and with workers.

    python benchmarks/loading.py --steps 40

LLaVA-1.5's processor at 336 pixels on JPEG pictures of 640 x 480 in a memory-mapped set, 4 forget and 4 retain rows a
step, the trainer's own loader; no forward pass. Processor time of the main process alone, and time on the clock.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from typing import Any

import biasunlearn_trainer  # noqa: F401  first: it mends torchvision beside a torch for the CPU

# isort: split
import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from shapes import Shape, make_llava

from biasunlearn_trainer import GADiffConfig, GADiffTrainer

ROWS = 4
SIZE = (640, 480)
# LLaVA-1.5's pictures and image tokens before a tiny language model: it is not run.
SHAPE = Shape(64, 128, 2, 4, 512, 32, 64, 2, 2, 336, 14)


def picture(seed: int) -> dict[str, Any]:
    """A JPEG of soft colours, as a photograph's size and decoding time want them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}


def rows(number: int, folder: str) -> Dataset:
    """A memory-mapped set."""
    columns = {
        "prompt": [f"<image>\nWho is the secretary in picture {i}?" for i in range(number)],
        "completion": [" It cannot be known."] * number,
        "images": [[picture(i)] for i in range(number)],
    }
    features = Features(prompt=Value("string"), completion=Value("string"), images=List(ImageFeature()))
    Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return load_from_disk(folder)


def loading(trainer: GADiffTrainer, steps: int) -> tuple[float, float]:
    """Milliseconds a step: processor time of this process, time on the clock."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)  # workers have started
    cpu, clock = time.process_time(), time.perf_counter()
    for _ in range(steps):
        batch = next(batches)
    assert batch["forget"]["pixel_values"].shape[0] == ROWS
    return (time.process_time() - cpu) / steps * 1e3, (time.perf_counter() - clock) / steps * 1e3


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = make_llava(SHAPE, "cpu", torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        number = ROWS * (args.steps + 1)
        sets = {"forget_dataset": rows(number, f"{folder}/f"), "retain_dataset": rows(number, f"{folder}/r")}
        print("| workers | main process, ms a step | on the clock, ms a step |\n|---|---|---|")
        for workers in args.workers:
            settings = GADiffConfig(
                folder, per_device_train_batch_size=ROWS, report_to=[], use_cpu=True, dataloader_num_workers=workers
            )
            trainer = GADiffTrainer(model=model, args=settings, processing_class=processor, **sets)
            cpu, clock = loading(trainer, args.steps)
            print(f"| {workers} | {cpu:.1f} | {clock:.1f} |")


if __name__ == "__main__":
    main()
