"""Probes measure without a trace; the guard says what left its bounds and stops when asked to."""

import math
import random

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.guards import CollapseGuard
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.probes import ProbeCallback, undisturbed
from biasunlearn_trainer.trainers.ga_diff import GADiffConfig, GADiffTrainer

FORGET = [{"prompt": f"Who was late {i}?", "completion": " The tall one."} for i in range(4)]
RETAIN = [{"prompt": f"Colour {i}?", "completion": " Blue."} for i in range(4)]


class MeanLogp:
    """A task that draws random numbers while it measures, as sampling code would."""

    name = "logp@retain"
    rows = RETAIN

    def run(self, scorer) -> list[dict]:
        torch.rand(1), np.random.rand(), random.random()
        return [{"logp": score.logp} for score in scorer.score(self.rows)]

    def summarise(self, items, baseline=None) -> TaskResult:
        mean = sum(item["logp"] for item in items) / len(items)
        return TaskResult(metrics={"facts": MetricValue(mean, len(items), (mean, mean))})


def train(model_path, output_dir, probes: bool, resume: bool = False, stop_at: int = 6):
    args = GADiffConfig(
        output_dir=str(output_dir), max_steps=stop_at, per_device_train_batch_size=2, learning_rate=1e-3,
        logging_steps=2, save_steps=4, lr_scheduler_type="constant", use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(str(model_path), dtype="float32")
    model.config.attention_dropout = 0.1  # random numbers in every step: a probe that draws would change the rest
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    trainer = GADiffTrainer(model, args, FORGET, RETAIN, processing_class=load_processor(str(model_path)))
    if probes:
        trainer.add_callback(ProbeCallback(trainer, [MeanLogp()], every=2))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def probe_records(trainer) -> dict[int, float]:
    return {
        r["step"]: r["probe/logp@retain/facts"] for r in trainer.state.log_history if "probe/logp@retain/facts" in r
    }


def test_probes_are_logged_and_leave_the_weights_bit_identical(tiny_llama, tmp_path):
    probed = train(tiny_llama, tmp_path / "a", probes=True)
    plain = train(tiny_llama, tmp_path / "b", probes=False)
    assert torch.equal(weights(probed), weights(plain))
    assert sorted(probe_records(probed)) == [0, 2, 4, 6]
    losses = [r["loss"] for r in plain.state.log_history if "loss" in r]
    assert losses == [r["loss"] for r in probed.state.log_history if "loss" in r]


def test_probe_history_survives_a_resume(tiny_llama, tmp_path):
    whole = train(tiny_llama, tmp_path / "a", probes=True)
    train(tiny_llama, tmp_path / "b", probes=True, stop_at=4)
    resumed = train(tiny_llama, tmp_path / "b", probes=True, resume=True)
    assert probe_records(resumed) == probe_records(whole)


def test_probe_that_cannot_measure_a_diverged_model_stops_the_run(tiny_llama, tmp_path, caplog):
    class Diverged(MeanLogp):
        calls = 0

        def run(self, scorer):
            self.calls += 1
            if self.calls > 1:
                raise ValueError("no finite log-probability")
            return super().run(scorer)

    trainer = train(tiny_llama, tmp_path, probes=False, stop_at=1)
    trainer.args.max_steps = 6
    trainer.add_callback(ProbeCallback(trainer, [Diverged()], every=2))
    trainer.train()
    assert trainer.state.global_step == 2
    assert "no finite log-probability" in caplog.text


def test_undisturbed_restores_modes_and_random_states():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model.train()
    model[0].eval()
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    with pytest.raises(RuntimeError), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError
    assert [m.training for m in model] == [False, True]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def judge(guard: CollapseGuard, *records: dict) -> TrainerControl:
    """Feeds records to the guard as the trainer does: appended to the history first."""
    state, control = TrainerState(), TrainerControl()
    for step, record in enumerate(records):
        state.global_step = step * 10
        state.log_history.append({**record, "step": step * 10})
        guard.on_log(TrainingArguments(use_cpu=True), state, control, logs=record)
    return control


def test_guard_says_what_fell_and_what_to_do():
    guard = CollapseGuard(min_retained=0.9)
    control = judge(guard, {"probe/planted/facts": 1.0}, {"probe/planted/facts": 0.91}, {"probe/planted/facts": 0.5})
    assert len(guard.messages) == 1
    for words in ("step 20", "planted/facts", "0.50", "from 1.00", "0.90", "learning_rate", "retain_weight"):
        assert words in guard.messages[0]
    assert not control.should_training_stop


def test_guard_stops_when_asked_to():
    guard = CollapseGuard(action="stop")
    assert judge(guard, {"probe/planted/facts": 1.0}, {"probe/planted/facts": 0.2}).should_training_stop


def test_guard_watches_retained_metrics_only():
    guard = CollapseGuard()
    judge(guard, {"probe/planted/reliability": 1.0}, {"probe/planted/reliability": 0.0})
    assert guard.messages == []


def test_guard_speaks_again_only_after_a_recovery():
    guard = CollapseGuard()
    values = [1.0, 0.5, 0.4, 1.0, 0.3]
    judge(guard, *({"probe/planted/perception": value} for value in values))
    assert len(guard.messages) == 2


@pytest.mark.parametrize("name", ["loss", "loss/forget", "kl/retain"])
def test_guard_bounds_the_size_of_the_loss(name):
    guard = CollapseGuard(max_loss=50, action="stop")
    assert not judge(guard, {name: -49.0}).should_training_stop
    assert judge(guard, {name: -51.0}).should_training_stop
    assert name in guard.messages[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number_always_stops(value):
    guard = CollapseGuard(min_retained=None, max_loss=None, action="warn")
    assert judge(guard, {"loss/forget": value}).should_training_stop
    assert str(value) in guard.messages[0]


def test_bounds_can_be_switched_off():
    guard = CollapseGuard(min_retained=None, max_loss=None)
    judge(guard, {"probe/planted/facts": 1.0, "loss": 1e9}, {"probe/planted/facts": 0.0})
    assert guard.messages == []


def test_faulty_settings():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        ProbeCallback(None, [], every=0)
    with pytest.raises(ValueError, match="warn or stop, got 'halt'"):
        CollapseGuard(action="halt")
