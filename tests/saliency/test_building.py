"""Masks of whole sets: against a slow reference, cached, with both Fishers."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.saliency import SaliencyBuilder, SaliencySettings


@pytest.fixture
def builder(tiny_llava, tmp_path):
    PartialState(cpu=True)
    model = load_model(str(tiny_llava))
    collator = CompletionCollator(load_processor(str(tiny_llava)))

    def make(**settings):
        return SaliencyBuilder(model, collator, Accelerator(cpu=True), SaliencySettings(**settings), tmp_path / "masks")

    return make


@pytest.fixture
def sets(image_rows, text_rows):
    return image_rows(5, "t"), [*image_rows(3, "p"), *text_rows(4, "q")]


def slow_fisher(builder, rows):
    """The mean over rows of squared gradients, each from a backward of its own."""
    weights = dict(builder.model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for row in rows:
        output = forward_completions(builder.model.eval(), builder.collator([row]))
        loss = -output.token_logps.sum() / output.mask.sum()
        gradients = torch.autograd.grad(loss, weights.values(), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += 0 if gradient is None else gradient**2 / len(rows)
    return total


@pytest.mark.parametrize("threshold", [1.0, 4.0])
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_mask_is_the_ratio_of_two_fishers(threshold, one_pass, builder, sets):
    made = builder(threshold=threshold, one_pass=one_pass)
    mask = made.mask(*sets)
    target, preserve = (slow_fisher(made, rows) for rows in sets)
    assert mask.shapes.keys() == target.keys()
    largest = max(s_t.max() for s_t in target.values())
    for name, s_t in target.items():
        if s_t.max() < 1e-12 * largest and s_t.any():
            assert name.endswith("k_proj.bias"), "softmax does not see it: its gradient is 0 but for rounding"
            continue
        expected = (s_t >= threshold * preserve[name]) & (s_t > 1e-30)
        # Weights within rounding of the threshold may fall on either side.
        clear = (s_t / (threshold * preserve[name]) - 1).abs() > 1e-4
        assert torch.equal(mask.get(name)[clear], expected[clear]), name
    assert 0 < mask.density < 1


def test_what_no_text_row_reaches_is_salient_for_pictures(builder, image_rows, text_rows):
    """With text alone to preserve, every weight of the projector that pictures use is salient: S_P is 0."""
    mask = builder(threshold=1e6).mask(image_rows(3), text_rows(3))
    name = "model.multi_modal_projector.linear_2.weight"
    assert mask.get(name).float().mean() > 0.99
    # Swapped: nothing of the projector matters for text.
    mask = builder(threshold=1e-6).mask(text_rows(3), image_rows(3))
    assert mask.count(name) == 0


def test_per_batch_squares_the_gradient_of_the_mean(builder, sets):
    per_sample, per_batch = builder().mask(*sets), builder(fisher="per_batch", batch_size=3).mask(*sets)
    assert any(not torch.equal(per_sample.get(name), per_batch.get(name)) for name in per_sample.bits)
    # In batches of one the two are the same.
    alone = builder(fisher="per_batch", batch_size=1).mask(*sets)
    exact = [name for name in per_sample.bits if not name.endswith("k_proj.bias")]  # those are 0 but for rounding
    same = [(per_sample.get(name) == alone.get(name)).float().mean() for name in exact]
    assert min(same) > 0.999


@pytest.mark.parametrize("settings", [{"batched": False}, {"batch_size": 2}])
def test_a_mask_does_not_depend_on_how_many_rows_are_taken_at_once(settings, builder, sets, tmp_path):
    batched = builder().mask(*sets)
    other = builder(**settings)
    (path,) = (tmp_path / "masks").iterdir()
    written = path.stat().st_mtime_ns
    other.mask(*sets)
    assert path.stat().st_mtime_ns == written, "the cache holds it for both"
    path.unlink()
    again = other.mask(*sets)
    assert path.is_file()
    for name in batched.bits:
        if not name.endswith("k_proj.bias"):  # 0 but for rounding
            assert (batched.get(name) == again.get(name)).float().mean() > 0.999, name


def test_the_model_is_left_as_it_was(builder, sets):
    made = builder()
    made.model.train()
    made.model.model.vision_tower.eval()
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    made.mask(*sets)
    assert made.model.training and not made.model.model.vision_tower.training
    assert all(torch.equal(before[name], value) for name, value in made.model.named_parameters())
    assert all(value.grad is None for value in made.model.parameters())


def test_a_mask_is_made_once(builder, sets, tmp_path, caplog):
    first = builder().mask(*sets)
    (file,) = (tmp_path / "masks").iterdir()
    caplog.set_level(logging.INFO)
    again = builder(one_pass=True).mask(*sets)
    assert f"Saliency mask of the run: {file}" in caplog.text
    assert all(torch.equal(first.bits[name], again.bits[name]) for name in first.bits)
    assert again.provenance["target"]["rows"] == 5 and again.provenance["preserve"]["rows"] == 7


@pytest.mark.parametrize("changed", ["threshold", "rows", "weights"])
def test_whatever_changes_makes_a_new_mask(changed, builder, sets, tmp_path):
    builder().mask(*sets)
    made = builder(threshold=2.0) if changed == "threshold" else builder()
    target, preserve = sets
    if changed == "rows":
        preserve = preserve[1:]
    if changed == "weights":
        with torch.no_grad():
            next(made.model.parameters())[0] += 1
        made = builder()
    made.mask(target, preserve)
    assert len(list((tmp_path / "masks").iterdir())) == 2


@pytest.mark.parametrize("fault", ["renamed", "damaged", "cut off"])
def test_a_file_that_is_not_the_mask_is_refused_and_made_anew(fault, builder, sets, tmp_path, caplog):
    mask = builder().mask(*sets)
    (path,) = (tmp_path / "masks").iterdir()
    if fault == "renamed":
        builder(threshold=2.0).mask(*sets)
        (other,) = set((tmp_path / "masks").iterdir()) - {path}
        path.write_bytes(other.read_bytes())
    data = bytearray(path.read_bytes())
    data[-3] ^= fault == "damaged"
    path.write_bytes(data[: -5 if fault == "cut off" else None])
    again = builder().mask(*sets)
    expected = {"renamed": "other threshold (2.0, expected 1.0)", "damaged": "checksum", "cut off": "it is damaged"}
    assert f"{path} is not read" in caplog.text and expected[fault] in caplog.text
    exact = [name for name in mask.bits if not name.endswith("k_proj.bias")]  # those are 0 but for rounding
    assert min((mask.get(name) == again.get(name)).float().mean() for name in exact) > 0.999
    caplog.clear()
    builder().mask(*sets)
    assert not caplog.text


def test_a_disk_that_takes_nothing_leaves_masks_and_sums_in_memory(builder, sets, tmp_path, caplog):
    expected = builder().mask(*sets)
    made = builder()
    made.cache_dir = tmp_path / "file"
    made.cache_dir.write_text("a file where a folder should be")
    mask = made.mask(*sets)
    assert "cannot wait in" in caplog.text and "Saliency mask of the run cannot be kept" in caplog.text
    exact = [name for name in mask.bits if not name.endswith("k_proj.bias")]  # those are 0 but for rounding
    assert min((mask.get(name) == expected.get(name)).float().mean() for name in exact) > 0.999


def test_settings_out_of_range_are_listed_together():
    with pytest.raises(ValueError, match=r"saliency_threshold.*got 0") as err:
        SaliencySettings(threshold=0, epsilon=-1.0, fisher="per_token")
    assert "saliency_epsilon" in str(err.value) and "per_sample, per_batch" in str(err.value)
