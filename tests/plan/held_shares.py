"""A rank that trains a recipe under DeepSpeed and says what it holds.

python -m torch.distributed.run --nproc_per_node=2 held_shares.py RECIPE OUTPUT       # writes OUTPUT.0 and OUTPUT.1
"""

import json
import os
import sys
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

import biasunlearn_trainer  # noqa: F401  before transformers, for torchvision beside a CPU torch
from biasunlearn_trainer.recipe import parse_recipe
from biasunlearn_trainer.runner.data import load_streams
from biasunlearn_trainer.runner.models import load_for_run
from biasunlearn_trainer.runner.run import build_trainer, config_and_processor


def kept(values):
    """Bytes of weights that stay on this rank; of a partitioned one its own part."""
    parts = [getattr(value, "ds_tensor", value) for value in values]
    return sum(part.nbytes for part in parts)


def gradients(zero):
    """Bytes of this rank's gradients when the optimizer is about to step."""
    flat = getattr(zero, "grad_partitions_flat_buffer", None)  # ZeRO-3
    if flat is not None:
        return flat.nbytes
    groups = zero.averaged_gradients.values()  # ZeRO-2
    return sum(part.nbytes for group in groups for part in ([group] if hasattr(group, "nbytes") else group))


def states(zero):
    """Bytes of the float32 copy of this rank's weights, and of the optimizer's states."""
    masters = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    found = [value for state in zero.optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")]
    return sum(part.nbytes for part in masters) + sum(value.nbytes for value in found if value.numel() > 1)


held, step = {}, DeepSpeedEngine.step


def watched_step(engine, *args, **kwargs):
    held["gradients"] = gradients(engine.optimizer)
    done = step(engine, *args, **kwargs)
    held["weights"] = kept([*engine.module.parameters(), *engine.module.buffers()])
    held["optimizer"] = states(engine.optimizer)
    return done


DeepSpeedEngine.step = watched_step
recipe = parse_recipe([sys.argv[1]])
model = load_for_run(recipe, recipe.model.model_name_or_path)
processor = config_and_processor(recipe)[1]
trainer, _ = build_trainer(recipe, model, processor, load_streams(recipe), [], None)
trainer.train()
for reference in trainer.reference.values():
    if hasattr(reference, "model"):
        held["reference"] = kept([*reference.model.parameters(), *reference.model.buffers()])
Path(f"{sys.argv[2]}.{os.environ['RANK']}").write_text(json.dumps(held))
os._exit(0)  # all is written; on a busy machine a thread of gloo may abort the interpreter's own way out
