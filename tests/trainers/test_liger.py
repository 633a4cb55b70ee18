"""What liger-kernel may replace; its kernels need a GPU, what it puts in a model's place does not."""

import json

import pytest
import torch

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.trainers.ga import GAConfig


def settings(**more):
    return GAConfig(output_dir="x", use_cpu=True, report_to=[], use_liger_kernel=True, **more)


def test_head_and_loss_stay_the_librarys_own():
    own = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert settings().liger_kernel_config == own
    assert settings(liger_kernel_config={"rope": False}).liger_kernel_config == {"rope": False, **own}
    assert settings(liger_kernel_config=json.dumps({"swiglu": False})).liger_kernel_config == {"swiglu": False, **own}


@pytest.mark.parametrize("name", ["fused_linear_cross_entropy", "cross_entropy"])
def test_a_loss_that_nobody_takes_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} replaces a loss"):
        settings(liger_kernel_config={name: True})


def test_a_patched_model_still_takes_a_choice_of_positions(make_trainer):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from transformers.integrations.liger import apply_liger_kernel

    trainer = make_trainer("ga")
    batch = trainer.data_collator([trainer.train_dataset[0]])["forget"]
    model = trainer.model.eval()
    expected = forward_completions(model, batch).logps
    on_gpu = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)
    apply_liger_kernel(model, on_gpu | settings().liger_kernel_config)
    torch.testing.assert_close(forward_completions(model, batch).logps, expected)
