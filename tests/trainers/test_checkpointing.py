"""A trainer goes on from its own whole checkpoints, with everything that is in them, and from no others."""

import shutil

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer.checkpoints import CheckpointError, faults_of, read_seal
from biasunlearn_trainer.guards import TrainingFault
from biasunlearn_trainer.trainers.checkpointing import misfits
from biasunlearn_trainer.trainers.steering import BiasReading

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "max_steps": 6}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def log_of(trainer):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in trainer.state.log_history]


def equal(one, other):
    return all(torch.equal(value, other.get_parameter(name)) for name, value in one.named_parameters())


def test_a_record_in_the_making_is_taken_up(make_trainer, tmp_path):
    """Logged every 3 steps, saved every 2: the first record after step 2 has the sums of step 1 and 2, too."""

    def run(resume=None):
        trainer = make_trainer("npo", **SAVING | {"logging_steps": 3})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "out" / "checkpoint-2"))
    assert log_of(resumed) == log_of(whole) and len(log_of(whole)) == 3


def test_mask_and_reference_are_the_checkpoints(make_trainer, tmp_path):
    """Without their caches, and from another adapter than the run began with."""

    def run(resume=None):
        settings = SAVING | {"reference": "precomputed", "saliency_mask": "fisher", "lr_scheduler_type": "linear"}
        trainer = make_trainer("npo", peft_config=LoraConfig(r=2, lora_dropout=0.1), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    torch.manual_seed(0)
    whole = run()
    for cache in ("references", "saliency"):
        shutil.rmtree(tmp_path / cache)
    torch.manual_seed(1)
    resumed = run(str(tmp_path / "out" / "checkpoint-2"))
    assert equal(whole.model, resumed.model)
    assert all(torch.equal(bits, resumed.saliency_mask.bits[name]) for name, bits in whole.saliency_mask.bits.items())
    assert torch.equal(whole.reference["forget"].table, resumed.reference["forget"].table)
    assert not (tmp_path / "references").exists() and not (tmp_path / "saliency").exists()


def test_what_is_frozen_in_an_adapter_stays_frozen(make_trainer):
    """The reference switches the adapter off and on in every step; PEFT would make its A matrices trainable then."""
    trainer = make_trainer("npo", peft_config=LoraConfig(r=2), saliency_mask="fisher", reference="adapter")
    trainer.train()
    assert not [n for n, value in trainer.model.named_parameters() if "lora_A" in n and value.requires_grad]


def test_a_run_that_had_ended_takes_no_further_step(make_trainer, tmp_path):
    """Three steps an epoch: its fifth is in the middle of one."""
    for expected, more in ((5, {}), (6, {"max_steps": 6})):
        trainer = make_trainer("ga", **SAVING | {"max_steps": 5} | more)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5") if expected != 5 else None)
        assert trainer.state.global_step == expected
    trainer = make_trainer("ga", **SAVING | {"max_steps": 5})
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert trainer.state.global_step == 5


def test_a_run_that_its_probe_had_ended_takes_no_further_step(make_trainer, tmp_path):
    from biasunlearn_trainer.trainers.registry import get_method

    def unbiased(model):
        return {"race": BiasReading(50.0, 90.0, 500), "gender": BiasReading(50.0, 90.0, 500)}

    def run(resume=None):
        trainer = make_trainer("biasunlearn", probe_steps=1, **SAVING | {"save_steps": 1, "early_stop": True})
        steering = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "BiasSteering")
        steering.probe = unbiased
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert get_method("biasunlearn")
    whole = run()
    stopped_at = whole.state.global_step
    assert stopped_at == 1  # the probes of step 0 and 1 are two in a row
    resumed = run(str(tmp_path / "out" / "checkpoint-1"))
    assert resumed.state.global_step == stopped_at and equal(whole.model, resumed.model)


def test_the_best_is_found_where_the_folder_lies_now(make_trainer, tmp_path, caplog):
    def run(folder, resume=None, **more):
        trainer = make_trainer("biasunlearn", probe_steps=2, output_dir=str(tmp_path / folder), **SAVING | more)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = run("first", max_steps=4)
    assert first.state.best_global_step == 2
    shutil.move(tmp_path / "first", tmp_path / "moved")
    again = run("moved", str(tmp_path / "moved" / "checkpoint-4"))
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    (tmp_path / "moved" / "checkpoint-2" / "model.safetensors").unlink()
    caplog.clear()
    run("moved", str(tmp_path / "moved" / "checkpoint-4"))
    assert "checkpoint-2, the best so far, cannot be used (model.safetensors is missing)" in caplog.text


def test_a_resumed_run_saves_as_often_as_it_says_itself(make_trainer, tmp_path):
    make_trainer("ga", **SAVING | {"max_steps": 2}).train()
    make_trainer("ga", **SAVING | {"save_steps": 3}).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-6",
    ]


def test_what_cannot_be_continued_is_said_before_a_step(make_trainer, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        make_trainer("npo").train(resume_from_checkpoint=True)
    make_trainer("npo", peft_config=LoraConfig(r=2), **SAVING | {"max_steps": 2}).train()
    folder = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(CheckpointError, match="method NPOTrainer, this run has GATrainer"):
        make_trainer("ga", peft_config=LoraConfig(r=2)).train(resume_from_checkpoint=str(folder))
    with pytest.raises(CheckpointError, match="other trainable weights, by name or shape"):
        make_trainer("npo", peft_config=LoraConfig(r=4)).train(resume_from_checkpoint=True)
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt has 0 bytes of"):
        make_trainer("npo", peft_config=LoraConfig(r=2)).train(resume_from_checkpoint=str(folder))
    with pytest.raises(CheckpointError, match="no usable checkpoint in"):
        make_trainer("npo", peft_config=LoraConfig(r=2)).train(resume_from_checkpoint=True)


def test_weights_alone_do_not_go_on(make_trainer, tmp_path):
    make_trainer("npo", **SAVING | {"max_steps": 2, "save_only_model": True}).train()
    with pytest.raises(CheckpointError, match="no optimizer, only weights"):
        make_trainer("npo", **SAVING).train(resume_from_checkpoint=True)


def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path):
    trainer = make_trainer("ga", **SAVING | {"max_steps": 4})

    class Spoiling(torch.optim.AdamW):
        taken = 0

        def step(self, closure=None):
            super().step(closure)
            self.taken += 1
            if self.taken == 4:
                self.param_groups[0]["params"][0].data.fill_(float("inf"))

    trainer.optimizer = Spoiling([value for value in trainer.model.parameters() if value.requires_grad], lr=1e-3)
    with pytest.raises(TrainingFault, match=r"step 4: the weights are not finite.*checkpoint-2 is from before"):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    assert faults_of(tmp_path / "out" / "checkpoint-2") == []


NOW = {"method": "NPOTrainer", "model": "m", "backend": "whole", "processes": 2, "rows_per_step": 8, "weights": "w"}


@pytest.mark.parametrize(
    ("wrote", "now", "words"),
    [
        ({}, {}, []),
        ({"processes": 4}, {}, []),
        ({"rows_per_step": 4, "processes": 1}, {}, ["has to be 4"]),
        ({"backend": "ZeRO-3"}, {}, ["was written under ZeRO-3, this launch is whole"]),
        ({"backend": "ZeRO-2", "processes": 4}, {"backend": "ZeRO-2"}, ["written by 4 processes", "launch 4"]),
        ({"method": "GATrainer", "model": "n"}, {}, ["the method GATrainer", "the model n"]),
    ],
)
def test_misfits_by_hand(wrote, now, words, tmp_path):
    faults = misfits(tmp_path / "checkpoint-2", NOW | wrote, NOW | now, tmp_path)
    assert bool(faults) is bool(words)
    for part in words:
        assert any(part in fault for fault in faults)


def test_pickled_states_are_read_from_the_runs_own_folder_only(tmp_path):
    zero = NOW | {"backend": "ZeRO-2"}
    assert misfits(tmp_path / "run" / "checkpoint-2", zero, zero, tmp_path / "run") == []
    assert "pickled states" in misfits(tmp_path / "other" / "checkpoint-2", zero, zero, tmp_path / "run")[0]


def test_the_seal_says_who_wrote_it(make_trainer, tmp_path, tiny_llama):
    make_trainer("npo", **SAVING | {"max_steps": 2}).train()
    wrote = read_seal(tmp_path / "out" / "checkpoint-2")["run"]
    assert {key: wrote[key] for key in ("method", "model", "backend", "processes", "rows_per_step")} == {
        "method": "NPOTrainer",
        "model": tiny_llama.name,
        "backend": "whole",
        "processes": 1,
        "rows_per_step": 2,
    }
