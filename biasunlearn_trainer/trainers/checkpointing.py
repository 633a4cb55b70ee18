"""The part of a trainer that writes whole checkpoints and continues from them as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from biasunlearn_trainer.checkpoints import (
    NO_SPACE,
    PREFIX,
    UNFINISHED,
    CheckpointError,
    checkpoints_in,
    clear_unfinished,
    complete,
    faults_of,
    last_usable,
    read_seal,
    rotate,
)
from biasunlearn_trainer.guards import REMEDY, TrainingFault
from biasunlearn_trainer.models import keeping_frozen
from biasunlearn_trainer.reference import PrecomputedReference
from biasunlearn_trainer.run_files import STATE_FILE
from biasunlearn_trainer.sharding import backend

logger = logging.getLogger(__name__)

MASK_FILE = "saliency_mask.safetensors"
REFERENCE_FILE = "reference.safetensors"
SUMS_FILE = "log_sums.json"


def model_name(name_or_path: str) -> str:
    """What a model is called, wherever its folder lies: a Hub id, or the name of the folder."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else str(name_or_path)


def misfits(folder: Path, wrote: Mapping[str, Any], now: Mapping[str, Any], output_dir: str | os.PathLike) -> list[str]:
    """Why a run cannot continue from a checkpoint, and what can be done with it instead.

    Args:
        folder: the checkpoint.
        wrote: the run that wrote it: `method`, `model`, `backend`, `processes`, `rows_per_step`, `weights`.
        now: the run that is to continue; what it does not know yet is left out.
        output_dir: of the run that is to continue.
    """
    faults = []
    fresh = f"To begin a new run with its weights, set model_name_or_path: {folder} and another output_dir."
    for key, name in (("method", "method"), ("model", "model")):
        if key in now and wrote.get(key) != now[key]:
            faults.append(
                f"{folder} was written with the {name} {wrote.get(key)}, this run has {now[key]}. A checkpoint "
                f"continues nothing but its own run. {fresh}"
            )
    if "weights" in now and wrote.get("weights") != now["weights"]:
        faults.append(
            f"{folder} holds other trainable weights, by name or shape, than this model has: set the adapter and "
            f"trainable_groups as they were. {fresh}"
        )
    had, has = wrote.get("backend", "whole"), now["backend"]
    if had != has:
        faults.append(f"{folder} was written under {had}, this launch is {has}: launch it as it was. {fresh}")
    elif had.startswith("ZeRO") and wrote["processes"] != now["processes"]:
        faults.append(
            f"{folder} was written by {wrote['processes']} processes, this launch has {now['processes']}. {had} keeps "
            f"a part of the optimizer on each: launch {wrote['processes']}. {fresh}"
        )
    if wrote["rows_per_step"] != now["rows_per_step"]:
        faults.append(
            f"{folder} was written with {wrote['rows_per_step']} rows in a step ({wrote['processes']} processes), this "
            f"launch has {now['rows_per_step']} ({now['processes']} processes). The number of processes may change, "
            "the rows in a step may not: per_device_train_batch_size x gradient_accumulation_steps x processes has to "
            f"be {wrote['rows_per_step']}."
        )
    # What shards the weights writes pickles, which run code when they are read.
    if has != "whole" and Path(output_dir).resolve() not in folder.resolve().parents:
        faults.append(f"{folder} holds pickled states of {has}; they are read from the run's own output_dir only.")
    if wrote.get("weights_only"):
        faults.append(f"{folder} has no optimizer, only weights (save_only_model). {fresh}")
    return faults


class Checkpointing:
    """What `UnlearnTrainer` does about checkpoints.

    Beside what transformers keeps (weights, optimizer, scheduler, random states, log) a checkpoint holds the saliency
    mask, the precomputed reference and the sums of the log's next record.
    """

    _is_saving = False
    _continued: Path | None = None
    _last_saved: Path | None = None
    _identity: dict[str, Any] | None = None

    def run_identity(self) -> dict[str, Any]:
        """What a checkpoint has to agree with to be continued from here."""
        if self._identity is None:  # while the model is not wrapped: a wrapper renames weights
            self._identity = self._read_identity()
        return self._identity

    def _read_identity(self) -> dict[str, Any]:
        args = self.args
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.model.named_parameters()):
            if value.requires_grad:
                digest.update(f"{name} {tuple(getattr(value, 'ds_shape', value.shape))}".encode())
        return {
            "method": type(self).__name__,
            "model": model_name(self.model.config._name_or_path),
            "backend": backend(),
            "processes": args.world_size,
            "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "weights": digest.hexdigest(),
            "weights_only": args.save_only_model,
        }

    def find_checkpoint(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> str | None:
        """The checkpoint to continue from, checked; every process gets the main one's answer.

        Args:
            resume_from_checkpoint: as for `transformers.Trainer.train`; True takes the newest one that is usable.

        Raises:
            CheckpointError: there is none, it is broken, or another run wrote it.
        """
        self.run_identity()
        found = None
        if self.is_world_process_zero():
            clear_unfinished(self.args.output_dir)
            found = self._checked(resume_from_checkpoint) if resume_from_checkpoint else None
        found = self._as_main(found)
        if isinstance(found, CheckpointError):
            raise found
        self._continued = Path(found) if found else None
        return found

    def _checked(self, resume: str | os.PathLike | bool) -> str | CheckpointError:
        if resume is True:
            folder = last_usable(self.args.output_dir)
            if folder is None:
                what = "no usable checkpoint" if checkpoints_in(self.args.output_dir) else "no checkpoint"
                return CheckpointError(f"There is {what} in {self.args.output_dir} to continue from.")
        else:
            folder = Path(resume)
            faults = faults_of(folder)
            if faults:
                return CheckpointError(f"{folder} cannot be continued from: {'; '.join(faults)}.")
        wrote, now = read_seal(folder)["run"], self.run_identity()
        faults = misfits(folder, wrote, now, self.args.output_dir)
        if faults:
            return CheckpointError("\n".join(faults))
        if wrote["processes"] != now["processes"]:
            logger.warning(
                "%s was written by %d processes, %d continue: the same rows in every step, the same weights to "
                "rounding, other random numbers (dropout).",
                folder,
                wrote["processes"],
                now["processes"],
            )
        return str(folder)

    def _as_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        return broadcast_object_list([value])[0] if self.args.world_size > 1 else value

    # What stands in a checkpoint beside transformers' own files.

    def _kept_reference(self) -> dict[str, PrecomputedReference]:
        """By stream, the table of reference log-probabilities that the checkpoint holds."""
        path = self._continued / REFERENCE_FILE if self._continued else None
        if path is None or not path.is_file():
            return {}
        return {
            stream: PrecomputedReference(table)
            for stream, table in load_file(path).items()
            if len(table) == len(self.reference_rows(stream))
        }

    def _kept_mask(self) -> Path | None:
        """The file of the mask that the checkpoint holds."""
        path = self._continued / MASK_FILE if self._continued else None
        return path if path is not None and path.is_file() else None

    def _write_own_parts(self, folder: Path) -> None:
        if self.saliency_mask is not None:
            self.saliency_mask.save(folder / MASK_FILE)
        precomputed = {name: ref for name, ref in self.reference.items() if isinstance(ref, PrecomputedReference)}
        if precomputed:
            save_file(
                {name: ref.table.cpu().contiguous() for name, ref in precomputed.items()}, folder / REFERENCE_FILE
            )

    def _log_sums(self) -> dict[str, Any]:
        """What the next record of the log is made of so far; collective."""
        names = sorted(self._sums)
        own = [self._sums[name].double() for name in names]
        loss = self._tr_loss.detach().double().reshape(1)
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(loss, "mean")
            own = list(self.accelerator.reduce(torch.stack(own), "sum")) if own else []
        return {
            "loss": loss.item(),
            "logged_at": self._globalstep_last_logged,
            "sums": {name: entry.tolist() for name, entry in zip(names, own, strict=True)},
        }

    def _take_up_log(self, folder: Path) -> None:
        """Goes on with the sums of the record that was in the making."""
        kept = json.loads((folder / SUMS_FILE).read_text(encoding="utf-8"))
        self._tr_loss += kept["loss"]
        self._globalstep_last_logged = kept["logged_at"]
        if self.is_world_process_zero():  # they are summed over the processes again
            device = self._tr_loss.device
            self._sums = {name: torch.tensor(entry, device=device) for name, entry in kept["sums"].items()}

    # Into transformers' training loop.

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does it, into `unfinished/`; then whole, by one rename, to its place."""
        step, output_dir = self.state.global_step, Path(self._get_output_dir(trial))
        target, staged = output_dir / f"{PREFIX}{step}", output_dir / UNFINISHED / f"{PREFIX}{step}"
        if not self._weights_are_finite():
            before = last_usable(output_dir, thorough=False)
            raise TrainingFault(
                f"step {step}: the weights are not finite, so they are not saved and the run stops. "
                f"{f'{before} is from before.' if before else 'No checkpoint was written before.'} {REMEDY}"
            )
        sums = self._log_sums()
        pushes, self.args.push_to_hub, self._is_saving = self.args.push_to_hub, False, True
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._write_own_parts(staged)
                (staged / SUMS_FILE).write_text(json.dumps(sums) + "\n", encoding="utf-8")
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(target)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE_FILE))
                complete(staged, target, self.run_identity())
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as err:
            raise CheckpointError(self._why_not_saved(target, staged, err)) from err
        finally:
            self.args.push_to_hub, self._is_saving = pushes, False
        self.accelerator.wait_for_everyone()
        self._last_saved = target
        if self.args.should_save:
            rotate(output_dir, self.args.save_total_limit, target, self.state.best_model_checkpoint)
            shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
        if pushes:
            self._push_from_checkpoint(str(target))

    def _why_not_saved(self, target: Path, staged: Path, err: Exception) -> str:
        free = shutil.disk_usage(target.parent).free
        shutil.rmtree(staged, ignore_errors=True)
        before = last_usable(target.parent, thorough=False)
        kept = f"{before} is whole, resume_from_checkpoint: true goes on from it." if before else "None is before it."
        full = getattr(err, "errno", None) in NO_SPACE or "No space left" in str(err) or "File too large" in str(err)
        todo = (
            "The disk is full or a limit is reached: make room, lower save_total_limit, train a LoRA (use_peft: true), "
            "or choose an output_dir on another disk."
            if full
            else "Look after the disk and the rights of output_dir."
        )
        return f"{target.name} could not be written ({err}; {free / 2**20:.0f} MiB are free). {kept} {todo}"

    def _weights_are_finite(self) -> bool:
        """Whether every trained weight is a number; collective."""
        parts = (value for value in self.model.parameters() if value.requires_grad)
        finite = [torch.isfinite(_local(value)).all() for value in parts]
        bad = (~torch.stack(finite)).sum().float() if finite else torch.zeros((), device=self.args.device)
        return self.accelerator.reduce(bad, "sum").item() == 0 if self.args.world_size > 1 else bad.item() == 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; a run whose gradient is no number ends before a step is taken with it.

        In float16 the loss is scaled until its gradient overflows, and such steps are left out by the scaler itself.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and norm is not None and (not math.isfinite(float(norm)) or float(norm) < 0):
            raise self._fault_of(float(norm), model)
        return norm

    def _fault_of(self, norm: float, model: nn.Module) -> TrainingFault:
        """Keeps the weights as they were before the step where they are still there, and says what happened."""
        step = self.state.global_step
        found = "NaN or infinite" if norm < 0 else norm  # ZeRO's norm is -1 then
        # ZeRO's engine takes the step inside the backward pass, before anyone sees the norm.
        is_taken = backend().startswith("ZeRO")
        if step > 0 and not is_taken and self.args.save_strategy != "no" and self._weights_are_finite():
            target = Path(self.args.output_dir) / f"{PREFIX}{step}"
            if self._last_saved is None or self._last_saved.name != target.name:
                # Its log says nothing of the step that failed.
                self._sums, self._tr_loss = {}, torch.zeros_like(self._tr_loss)
                model.zero_grad()
                self._save_checkpoint(model, None)
            where = f"The weights before this step are in {target}."
        else:
            before = last_usable(self.args.output_dir, thorough=False)
            where = f"{before} is from before." if before else "No checkpoint was written before it."
        stops = "ZeRO has taken the step, its weights are not saved" if is_taken else "the run stops before it is taken"
        return TrainingFault(f"step {step + 1}: the gradient's norm is {found}; {stops}. {where} {REMEDY}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with keeping_frozen(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        trained = super()._init_training_state(max_steps, *args, **kwargs)
        # How often to log and save is what this run says, not what the interrupted one said.
        self.state.compute_steps(self.args, max_steps)
        if self._continued is not None and self.state.best_global_step:
            self._find_best()
        return trained

    def _find_best(self) -> None:
        """Takes up the best checkpoint where the folder lies now."""
        state = self.state
        folders = (Path(self.args.output_dir), self._continued.parent)
        places = [folder / f"{PREFIX}{state.best_global_step}" for folder in folders]
        best = next((place for place in places if place.is_dir()), places[0])
        faults = self._as_main(faults_of(best) if self.is_world_process_zero() else None)
        if faults:
            logger.warning("%s, the best so far, cannot be used (%s): the best from here on counts.", best, faults[0])
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        else:
            state.best_model_checkpoint = str(best)

    def _run_epoch(self, **kwargs: Any) -> None:
        """One epoch; none where the checkpoint is of a run that had come to its end."""
        if self._continued is not None:
            self._last_saved, self._continued = self._continued, None
            self._take_up_log(self._last_saved)
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)


def _local(value: Tensor) -> Tensor:
    """The part of a weight that this process holds (ZeRO-3, FSDP), or all of it."""
    value = getattr(value, "ds_tensor", value)
    return value.to_local() if hasattr(value, "to_local") else value.detach()
