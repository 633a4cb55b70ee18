"""The dual pathway: who is forgotten, who is retained, when roles are swapped and when training stops."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from biasunlearn_trainer import BiasReading, BiasUnlearnConfig
from biasunlearn_trainer.collators import choose_rows
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import npo_biasunlearn_loss, npo_loss
from biasunlearn_trainer.rows import Categories
from biasunlearn_trainer.trainers.biasunlearn import draw_adversarial
from biasunlearn_trainer.trainers.steering import SteeringRule

OFF = {"dynamic_swapping": False, "early_stop": False}
TYPES = ("race", "gender")


def pairs(num=8, types=TYPES):
    """Stereotypes "bad N" and anti-stereotypes "good N", the latter in another order."""
    sides = {"forget_dataset": " bad", "retain_dataset": " good and kind"}
    sets = {
        name: [
            {"prompt": f"Group {i} is", "completion": f"{text} {i}.", "bias_type": types[i % 2], "pair_id": str(i)}
            for i in range(num)
        ]
        for name, text in sides.items()
    }
    sets["retain_dataset"].reverse()
    return sets | {"utility_dataset": [{"prompt": "", "completion": f"Snow is white {i}."} for i in range(5)]}


def scripted(*scores):
    """A probe that finds at its n-th call the n-th scores of race and gender; the last ones from then on."""
    calls = iter(range(10**6))

    def probe(model):
        now = scores[min(next(calls), len(scores) - 1)]
        return {name: BiasReading(ss, 90.0, 300) for name, ss in zip(TYPES, now, strict=True)}

    return probe


def by_step(trainer_box, scores):
    """A probe whose scores depend on the step alone, as a deterministic model's would."""

    def probe(model):
        step = trainer_box[0].state.global_step
        return {name: BiasReading(ss, 90.0, 300) for name, ss in zip(TYPES, scores[step], strict=True)}

    return probe


def first_batch(trainer, size=4):
    return trainer.data_collator([trainer.train_dataset[draw] for draw in range(size)])


def completions(trainer, inputs):
    ids, mask = inputs["input_ids"], inputs["completion_mask"]
    decode = trainer.processing_class.decode
    return [decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)]


def probes_of(trainer):
    return [record for record in trainer.state.log_history if "probe/bias/score" in record]


def test_the_three_terms_and_their_weights(make_trainer):
    trainer = make_trainer("biasunlearn", datasets=pairs(), beta=0.3, **OFF)
    trainer.prepare_reference()
    batch = first_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        reference = {name: forward_completions(trainer.model, inputs) for name, inputs in batch.items()}
        trainer.model.lm_head.weight.mul_(2.0)
        policy = {name: forward_completions(trainer.model, inputs) for name, inputs in batch.items()}
        loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert set(batch) == {"forget", "retain", "utility"}
    p, q = (out["utility"].logits.log_softmax(-1) for out in (reference, policy))
    kl = policy["utility"].scatter((p.exp() * (p - q)).sum(-1)).sum(1) / policy["utility"].lengths
    expected = {
        "loss/forget": npo_loss(policy["forget"].logps, reference["forget"].logps, 0.3),
        "loss/retain": -policy["retain"].logps / policy["retain"].lengths,
        "kl/utility": kl,
    }
    torch.testing.assert_close(terms, expected, atol=1e-4, rtol=1e-4)
    total = 0.4 * expected["loss/forget"].mean() + 0.4 * expected["loss/retain"].mean() + 0.2 * kl.mean()
    torch.testing.assert_close(loss, total, atol=1e-4, rtol=1e-4)


def test_the_published_code_is_a_preset(make_trainer, caplog):
    config = BiasUnlearnConfig("x", preset="published_code", retain_weight=0.9, use_cpu=True)
    assert (config.forget_weight, config.retain_weight, config.utility_weight) == (0.5, 0.9, 0.2)
    trainer = make_trainer(
        "biasunlearn", datasets=pairs(), preset="published_code", gradient_accumulation_steps=2, **OFF
    )
    assert "nonlinear in the micro-batch" in caplog.text
    trainer.prepare_reference()
    batch = first_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        before = forward_completions(trainer.model, batch["forget"])
        trainer.model.lm_head.weight.mul_(2.0)
        after = forward_completions(trainer.model, batch["forget"])
        _, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = npo_biasunlearn_loss(after.logps, before.logps, after.lengths, 0.1)
    torch.testing.assert_close(terms["loss/forget"], expected, atol=1e-4, rtol=1e-4)


def test_the_adversarial_share_joins_the_forget_set(make_trainer):
    trainer = make_trainer("biasunlearn", datasets=pairs(8), adversarial_share=0.5, **OFF)
    forgotten = [row["completion"] for row in trainer.train_dataset.streams["forget"].rows]
    assert sum("bad" in text for text in forgotten) == 8 and sum("good" in text for text in forgotten) == 4
    added = [row for row in trainer.train_dataset.streams["forget"].rows if "good" in row["completion"]]
    assert sorted(row["bias_type"] for row in added) == ["gender", "gender", "race", "race"]
    retained = [row["completion"] for row in trainer.train_dataset.streams["retain"].rows]
    assert len(retained) == 8 and all("good" in text for text in retained)


def test_the_adversarial_draw_is_stratified_and_seeded():
    types = ["race"] * 40 + ["gender"] * 10 + ["age"]
    drawn = draw_adversarial(Categories.of(types), 0.25, seed=1)
    counts = {name: sum(types[row] == name for row in drawn) for name in set(types)}
    assert counts == {"race": 10, "gender": 2, "age": 0}
    again, other = (draw_adversarial(Categories.of(types), 0.25, seed=seed).tolist() for seed in (1, 2))
    assert drawn.tolist() == again != other
    assert [len(draw_adversarial(Categories.of(types), share, 0)) for share in (0.0, 1.0)] == [0, 51]


@pytest.mark.parametrize("swapped", [set(), {"race"}, {"race", "gender"}])
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_roles_are_looked_up_when_the_loss_is_computed(swapped, kind, make_trainer):
    """The batch was collated before the swap, as a prefetched one is."""
    datasets = {name: kind(rows) for name, rows in pairs().items()}
    trainer = make_trainer(
        "biasunlearn", datasets=datasets | {"bias_probe": scripted((60, 60))}, adversarial_share=0.5, seed=3
    )
    trainer.prepare_reference()
    batch = first_batch(trainer, size=8)
    trainer.swapped = swapped
    arranged = trainer.arrange(batch)
    assert set(arranged) == {"forget", "retain", "utility"}
    sides = {name: completions(trainer, arranged[name]) for name in ("forget", "retain")}
    for name, normal, exchanged in (("forget", "bad", "good"), ("retain", "good", "bad")):
        stream = trainer.train_dataset.streams[name].rows
        for index, text in zip(batch[name]["index"].tolist(), sides[name], strict=True):
            row = stream[index]
            is_adversarial = name == "forget" and "good" in row["completion"]
            expected = exchanged if (row["bias_type"] in swapped) != is_adversarial else normal
            assert expected in text and row["pair_id"] in text
    # The reference of each row is its own: before the first step policy and reference agree on every one.
    trainer.model.eval()
    with torch.no_grad():
        _, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(terms["loss/forget"], torch.full((8,), 20 * math.log(2)), atol=1e-4, rtol=0)


def test_rows_are_chosen_with_their_pictures():
    """Two pictures in one row, patches in number by the picture's size: what Qwen2-VL's processor gives."""

    def batch(mark, images, grids, width):
        grid = torch.tensor(grids)
        return {
            "input_ids": torch.full((2, width), mark),
            "attention_mask": torch.ones(2, width, dtype=torch.long),
            "completion_mask": torch.ones(2, width, dtype=torch.bool),
            "index": torch.tensor([mark, mark]),
            "num_images": torch.tensor(images),
            "image_grid_thw": grid,
            "pixel_values": torch.full((int(grid.prod(-1).sum()), 5), float(mark)),
        }

    first = batch(1, [2, 1], [[1, 2, 2], [1, 2, 4], [1, 4, 4]], 6)
    second = batch(2, [1, 1], [[1, 6, 2], [1, 2, 2]], 9)
    mixed = choose_rows(first, second, torch.tensor([False, True]), pad_token_id=7)
    assert mixed["input_ids"].tolist() == [[1] * 6 + [7] * 3, [2] * 9]
    assert mixed["attention_mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 9]
    assert mixed["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4], [1, 2, 2]]
    assert mixed["pixel_values"][:, 0].tolist() == [1.0] * 12 + [2.0] * 4
    assert mixed["num_images"].tolist() == [2, 1] and mixed["index"].tolist() == [1, 2]
    assert choose_rows(first, second, torch.tensor([True, True]), 7) == second


def test_each_set_has_its_own_size_a_step(make_trainer):
    trainer = make_trainer(
        "biasunlearn", datasets=pairs(), per_device_train_batch_size=4, per_device_retain_batch_size=6,
        per_device_utility_batch_size=1, **OFF,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert {name: len(inputs["input_ids"]) for name, inputs in batch.items()} == {
        "forget": 4,
        "retain": 6,
        "utility": 1,
    }
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(
        0.4 * first["loss/forget"] + 0.4 * first["loss/retain"] + 0.2 * first["kl/utility"], abs=1e-4
    )


def test_swapping_has_a_margin():
    """50.5 swaps neither there nor back; 48.9 and 51.1 do."""
    rule, swapped, seen = SteeringRule(), set(), []
    for ss in (62.0, 49.2, 48.9, 50.9, 49.5, 51.1, 50.0):
        swapped = rule.swapped({"race": BiasReading(ss, 90, 300)}, ["race"], swapped)
        seen.append("race" in swapped)
    assert seen == [False, False, True, True, True, False, False]
    assert not rule.swapped({"race": BiasReading(30.0, 90, 199)}, ["race"], set())  # too few items
    assert not SteeringRule(dynamic_swapping=False).swapped({"race": BiasReading(30.0, 90, 300)}, ["race"], set())


def test_a_run_swaps_and_says_so(make_trainer):
    probe = scripted((60, 60), (45, 55), (52, 55))
    trainer = make_trainer("biasunlearn", datasets=pairs() | {"bias_probe": probe}, probe_steps=1)
    trainer.train()
    records = probes_of(trainer)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record["probe/bias/race/swapped"] for record in records] == [0, 1, 0, 0]
    assert [record["probe/bias/gender/swapped"] for record in records] == [0, 0, 0, 0]
    assert records[1]["probe/bias/score"] == pytest.approx((90 * 45 / 50 + 90 * 45 / 50) / 2)
    assert all(record["probe/bias/race/num_items"] == 300 for record in records)


@pytest.mark.parametrize(
    ("scores", "steps"),
    [
        ([(60, 60), (51, 49), (51.9, 48.1), (60, 60)], 2),  # two in a row
        ([(60, 60), (51, 49), (53, 49), (51, 49), (50, 50)], 4),  # one, then none: counted anew
        ([(50, 50), (50, 50)], 1),  # the model was unbiased already
        ([(60, 60), (51, 53)], 5),  # one type alone is not enough
    ],
)
def test_training_stops_after_two_probes_within_the_tolerance(scores, steps, make_trainer):
    datasets = pairs() | {"bias_probe": scripted(*scores)}
    trainer = make_trainer("biasunlearn", datasets=datasets, probe_steps=1, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == steps
    assert ("probe/bias/stopped" in probes_of(trainer)[-1]) == (steps < 5)


def test_types_with_too_few_items_are_named_and_not_waited_for(make_trainer, caplog):
    def probe(model):
        return {"race": BiasReading(50.5, 90, 300), "gender": BiasReading(80.0, 90, 12)}

    trainer = make_trainer("biasunlearn", datasets=pairs() | {"bias_probe": probe}, probe_steps=1)
    trainer.train()
    assert "fewer than min_items=200 probe items: gender (12)" in caplog.text
    assert trainer.state.global_step == 1  # race alone decides: step 0 and step 1
    assert [r["probe/bias/gender/controlled"] for r in probes_of(trainer)] == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"No bias type of the training set has min_items=400.*race \(300\)"):
        make_trainer("biasunlearn", datasets=pairs() | {"bias_probe": probe}, min_items=400).train()


def test_the_best_probe_decides_which_weights_stay(make_trainer, tmp_path):
    datasets = pairs() | {"bias_probe": scripted((80, 80), (50, 50), (60, 60), (54, 54), (70, 70))}
    settings = {"datasets": datasets, "probe_steps": 1, "max_steps": 4, "save_strategy": "no"}
    trainer = make_trainer("biasunlearn", peft_config=LoraConfig(r=2), **settings)
    trainer.train()
    # Step 1 is the best probe, and a moment: its neighbours are far from 50. Steps 2 and 3 hold 60 and better.
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 4
    assert [r["probe/bias/held"] for r in probes_of(trainer)] == pytest.approx([36, 36, 72, 72, 54])
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert "checkpoint-2" in kept and len(kept) <= 2
    from peft import load_peft_weights

    best = load_peft_weights(str(tmp_path / "out" / "checkpoint-2"))
    now = {name.replace(".default", ""): value for name, value in trainer.model.named_parameters()}
    assert best and all(torch.equal(now[name], value) for name, value in best.items())


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 5])
def test_a_resumed_run_takes_up_swaps_probes_and_weights(stopped_at, make_trainer, tmp_path):
    scores = [(60, 60), (55, 48), (47, 48.5), (46, 52), (50.5, 53), (52.5, 47), (53, 47)]

    def run(folder, resume=None):
        torch.manual_seed(0)
        box = []
        box.append(
            make_trainer(
                "biasunlearn",
                peft_config=LoraConfig(r=2, lora_dropout=0.1),
                probe_steps=1,
                max_steps=6,
                datasets=pairs() | {"bias_probe": by_step(box, scores)},
                output_dir=str(tmp_path / folder),
                save_strategy="steps",
                save_steps=1,
                save_total_limit=9,
                learning_rate=1e-2,
            )
        )
        box[0].train(resume_from_checkpoint=resume)
        return box[0]

    whole = run("whole")
    swaps = [(r["probe/bias/race/swapped"], r["probe/bias/gender/swapped"]) for r in probes_of(whole)]
    assert swaps == [(0, 0), (0, 1), (1, 1), (1, 0), (1, 0), (0, 1), (0, 1)]
    resumed = run("resumed", resume=str(tmp_path / "whole" / f"checkpoint-{stopped_at}"))
    assert probes_of(resumed) == probes_of(whole)
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, resumed.model.get_parameter(name)), name


def test_a_probe_leaves_no_trace(make_trainer):
    """Dropout draws the same numbers with a probe that draws its own as without one."""

    def noisy(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(7)
        return {name: BiasReading(60.0, 90.0, 300) for name in TYPES}

    sets, finals = pairs(), []
    sets["retain_dataset"].reverse()  # in the order of the forget rows already, as swapping would put them
    for extra in ({"bias_probe": noisy}, {}):
        torch.manual_seed(0)
        settings = {"probe_steps": 1, "keep_best": False} if extra else OFF
        trainer = make_trainer(
            "biasunlearn", peft_config=LoraConfig(r=2, lora_dropout=0.3), datasets=sets | extra, **settings
        )
        trainer.train()
        finals.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert finals[0] == finals[1]


def test_without_a_weight_its_set_is_not_needed(make_trainer):
    sets = pairs()
    trainer = make_trainer("biasunlearn", datasets={**sets, "utility_dataset": None}, utility_weight=0.0, **OFF)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "kl/utility" not in first and trainer.reference_mode("forget") == "precomputed"
    bare = {"forget_dataset": sets["forget_dataset"]}
    trainer = make_trainer(
        "biasunlearn", datasets=bare, utility_weight=0.0, retain_weight=0.0, adversarial_share=0.0, **OFF
    )
    trainer.train()
    assert trainer.streams(trainer.args) == ("forget",)


def test_each_set_keeps_of_its_precomputed_reference_what_it_needs(make_trainer):
    trainer = make_trainer(
        "biasunlearn", datasets=pairs(), peft_config=LoraConfig(r=2), reference="precomputed", max_steps=1, **OFF
    )
    trainer.train()
    assert {name: type(source).__name__ for name, source in trainer.reference.items()} == {
        "forget": "PrecomputedReference",
        "utility": "StatesReference",
    }


def test_what_cannot_be_is_said_before_training(make_trainer):
    sets = pairs()
    with pytest.raises(ValueError, match=r"no bias probe.*dynamic_swapping=False and early_stop=False"):
        make_trainer("biasunlearn", datasets=sets)
    probe = {"bias_probe": scripted((60, 60))}
    without = [{k: v for k, v in row.items() if k != "bias_type"} for row in sets["forget_dataset"]]
    with pytest.raises(ValueError, match=r"8 of 8 forget rows have no `bias_type`"):
        make_trainer("biasunlearn", datasets={**sets, "forget_dataset": without, **probe})
    parted = [{**row, "bias_type": "age"} for row in sets["retain_dataset"]]
    with pytest.raises(ValueError, match=r"8 of 8 forget rows have a retain row of another `bias_type`"):
        make_trainer("biasunlearn", datasets={**sets, "retain_dataset": parted, **probe})
    with pytest.raises(ValueError, match=r"1 forget rows have no retain row"):
        make_trainer("biasunlearn", datasets={**sets, "retain_dataset": sets["retain_dataset"][1:], **probe})
    with pytest.raises(ValueError, match="needs a utility_dataset"):
        make_trainer("biasunlearn", datasets={**sets, "utility_dataset": None}, **OFF)
    with pytest.raises(ValueError, match=r"gives ss=160"):
        bad = {"bias_probe": lambda model: {"race": {"ss": 160, "lms": 90, "num_items": 300}}}
        make_trainer("biasunlearn", datasets={**sets, **bad}).train()
    with pytest.raises(ValueError, match=r"gives \['ss'\] for 'race'"):
        bad = {"bias_probe": lambda model: {"race": {"ss": 60}}}
        make_trainer("biasunlearn", datasets={**sets, **bad}).train()
    with pytest.raises(ValueError, match=r"(?s)`adversarial_share`.*`swap_margin`.*`min_items`"):
        BiasUnlearnConfig("x", adversarial_share=2, swap_margin=50, min_items=0, use_cpu=True)
