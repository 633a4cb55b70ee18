"""What is salient, and masks on disk."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from biasunlearn_trainer.saliency import SaliencyMask, salient


def test_salient_by_hand():
    target = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, 1e-20])
    preserve = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    # Ratios 2, 1, 0.5, 0, 0/0 and 1e-20 over the epsilon of 1e-30.
    assert salient(target, preserve, 1.0, 1e-30).tolist() == [True, True, False, False, False, True]
    assert salient(target, preserve, 2.0, 1e-30).tolist() == [True, False, False, False, False, True]
    assert salient(target, preserve, 0.5, 1e-30).tolist() == [True, True, True, False, False, True]
    # With a larger epsilon 1e-20 is no more than noise.
    assert salient(target, preserve, 1.0, 1e-10).tolist() == [True, True, False, False, False, False]


def test_ratios_that_no_float32_quotient_could_tell_are_compared():
    """1e-30 / 1e-38 overflows nothing and underflows nothing as a difference of logarithms."""
    tiny, huge = torch.tensor([3e-37]), torch.tensor([3e37])
    assert salient(huge, tiny, 1e38, 1e-38).item() and not salient(tiny, huge, 1e-38, 1e-38).item()


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 7)])
def test_bits_come_back_as_they_went_in(shape):
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = SaliencyMask.empty()
    mask.put("w", flags)
    assert torch.equal(mask.get("w"), flags) and mask.get("w").dtype == torch.bool
    assert mask.count("w") == flags.sum() and mask.num_weights == math.prod(shape)
    assert len(mask.bits["w"]) == -(-math.prod(shape) // 8)


def test_pieces_give_what_the_whole_gives(monkeypatch):
    monkeypatch.setattr("biasunlearn_trainer.saliency.masks.AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    target, preserve = torch.rand(5, 9, generator=generator), torch.rand(5, 9, generator=generator)
    mask = SaliencyMask.empty()
    for flat in (target.flatten(), target.flatten().numpy()):
        mask.compare("w", flat, preserve, 1.5, 1e-30)
        assert torch.equal(mask.get("w"), target >= 1.5 * preserve)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def mask_of(model):
    mask = SaliencyMask.empty()
    for name, value in model.named_parameters():
        mask.put(name, value > 0)
    mask.provenance = {"kind": "fisher", "model": "abc", "dtypes": {"weight": "float32", "bias": "float32"}}
    return mask


def test_a_file_holds_all_there_is(layer, tmp_path):
    mask = mask_of(layer)
    mask.save(tmp_path / "deep" / "mask.safetensors")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mask.safetensors"]
    again = SaliencyMask.load(tmp_path / "deep" / "mask.safetensors")
    assert again.shapes == mask.shapes and again.provenance == mask.provenance
    assert all(torch.equal(again.get(name), value > 0) for name, value in layer.named_parameters())
    again.check(layer, "abc")


def test_a_bit_a_weight_on_disk(tmp_path):
    """At most 1/7 byte per covered weight from ten million weights on."""
    mask = SaliencyMask.empty()
    for number in range(10):
        mask.put(f"layers.{number}.weight", torch.ones(1000, 1000, dtype=torch.bool))
    mask.save(tmp_path / "mask.safetensors")
    assert mask.num_weights == 10_000_000
    assert (tmp_path / "mask.safetensors").stat().st_size <= mask.num_weights / 7


def test_another_model_is_refused(layer):
    mask = mask_of(layer)
    with pytest.raises(ValueError, match="digest abc, the model's are xyz"):
        mask.check(layer, "xyz")
    with pytest.raises(ValueError, match=r"weight has shape \(4, 5\), its mask \(4, 6\)"):
        mask.check(nn.Linear(5, 4), "abc")
    with pytest.raises(ValueError, match="weight is bfloat16, its mask was made from float32"):
        mask.check(nn.Linear(6, 4, dtype=torch.bfloat16), "abc")
    with pytest.raises(ValueError, match=r"the trainable weight 1\.weight has no entry"):
        mask.check(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), "abc")
    with pytest.raises(ValueError, match="entry for bias, the model no such weight"):
        mask.check(nn.Linear(6, 4, bias=False), "abc")


def test_a_frozen_weight_needs_no_entry(layer):
    mask = mask_of(layer)
    del mask.shapes["bias"], mask.bits["bias"]
    with pytest.raises(ValueError, match="bias has no entry"):
        mask.check(layer, "abc")
    layer.bias.requires_grad_(False)
    mask.check(layer, "abc")


def test_what_is_no_mask_is_refused(tmp_path):
    with pytest.raises(OSError, match="no saliency mask"):
        SaliencyMask.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="no safetensors file"):
        SaliencyMask.load(tmp_path / "text.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no saliency mask: its metadata say format None"):
        SaliencyMask.load(tmp_path / "weights.safetensors")


def test_a_random_mask_has_the_density_of_every_weight():
    mask = SaliencyMask.empty()
    dense, thin = torch.zeros(40, 50, dtype=torch.bool), torch.zeros(1000, dtype=torch.bool)
    dense[:, :40], thin[:30] = True, True
    mask.put("dense", dense)
    mask.put("thin", thin)
    first, second = mask.shuffled(1), mask.shuffled(2)
    for drawn in (first, second):
        assert drawn.count("dense") == 1600 and drawn.count("thin") == 30
        # 1,600 of 2,000 at random: 1,280 of the 1,600 are expected to coincide, with a standard deviation of 8.
        assert 1240 < (drawn.get("dense") & dense).sum() < 1320
        assert drawn.provenance["kind"] == "random"
    assert not torch.equal(first.get("dense"), second.get("dense"))
    assert torch.equal(mask.shuffled(1).get("dense"), first.get("dense"))
