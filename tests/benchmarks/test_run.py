"""benchmarks/run.py: that what it compares is the same work, that it counts right, and that a whole run tells all."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LOADED = ("bounds", "flops", "naive", "peaks", "rounds", "run", "shapes", "steps", "training", "workloads")


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules by name, as its command finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in LOADED}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def compared(parts, tmp_path_factory):
    """By form our step and the naive way's, on models that have moved since the reference was made."""
    bench = parts["steps"].Bench(parts["workloads"].WORKLOADS["tiny"], "cpu", str(tmp_path_factory.mktemp("out")))
    pairs = {}
    for name, form, lora in parts["workloads"].forms_of(bench.workload, None):
        if form.equation:
            ours, streams, _ = bench.ours(form, lora)
            pairs[name] = (ours, bench.naive(form.equation, lora, streams))
    generator = torch.Generator().manual_seed(0)
    for lora in (False, True):
        for value in bench.model(lora).parameters():
            if value.requires_grad:
                value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return pairs


def taken(step):
    """Loss and gradient, in one piece."""
    loss = step.loss()
    loss.backward()
    gradients = [value.grad.flatten() for value in step.model.parameters() if value.grad is not None]
    step.model.zero_grad()
    return loss.item(), torch.cat(gradients)


def test_the_naive_way_takes_the_same_step(compared):
    assert len(compared) == 17
    for name, (ours, naive) in compared.items():
        (loss, gradient), (expected, wanted) = taken(ours), taken(naive)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5), name
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_plain_and_floor_fine_tuning_have_the_same_gradient_up_to_the_number_of_tokens(parts, tmp_path):
    work = parts["workloads"].WORKLOADS["tiny"]
    bench = parts["steps"].Bench(work, "cpu", str(tmp_path))
    _, _, together = bench.ours(parts["workloads"].FORMS["GA_Diff"], False)
    assert together["input_ids"].shape == (2 * work.rows, work.tokens)
    assert together["completion_mask"].sum(1).tolist() == [work.completion] * (2 * work.rows)
    (plain, gradient), (floor, wanted) = (taken(make(False, together)) for make in (bench.plain, bench.floor))
    assert plain * work.completion == pytest.approx(floor, rel=1e-5)
    torch.testing.assert_close(gradient * work.completion, wanted, rtol=1e-4, atol=1e-5)


def test_operations_of_a_step_by_hand(parts):
    shape = parts["shapes"].Shape(2, 3, num_layers=1, num_heads=1, vocab_size=5)
    # A layer: 4 x 2 x 2 + 3 x 2 x 3 = 34 weights; its adapter of rank 1: 4 x (2 + 2) + 3 x (2 + 3) = 31.
    # A token: 4 x 34 + 6 x 31 + attention 6 x 4 tokens x 2 = 370; the head at one position: 4 x 2 x 5 = 40.
    assert parts["flops"].lora_step(shape, rows=2, tokens=4, kept=1, rank=1) == 2 * (4 * 370 + 40)
    seeing = parts["shapes"].Shape(2, 3, 1, 1, 5, 4, 6, vision_layers=1, vision_heads=1, image_size=4, patch_size=2)
    # 4 patches and the class token. A layer: 2 x (4 x 16 + 2 x 24) = 224 and attention 4 x 5 x 4 = 80; the connector a
    # patch: 2 x (4 x 2 + 2 x 2) = 24; a patch's pixels: 2 x 3 x 4 x 4 = 96.
    assert parts["flops"].encoder(seeing) == 5 * (224 + 80) + 4 * (24 + 96)
    assert parts["flops"].utilisation(3e12, seconds=2.0, peak_tflops=6.0) == 0.25


def test_rounds_begin_with_another_case_each(parts):
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    times = parts["rounds"].interleaved(cases, 4, "cpu", seldom={"c"})
    assert "-".join("".join(order[i:j]) for i, j in ((0, 3), (3, 6), (6, 8), (8, 10), (10, 13))) == "abc-acb-ab-ba-bca"
    assert {name: [*values] for name, values in times.items()} == {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4], "c": [1, 4]}
    # Of the rounds that both took part in: 2, 1 and 4.
    assert parts["rounds"].ratio({1: 2.0, 2: 3.0, 3: 8.0, 4: 9.0}, {1: 1.0, 2: 3.0, 3: 2.0}).median == 2


def test_a_peak_counts_what_is_held_but_not_as_the_policys_weights(parts):
    model = torch.nn.Linear(100, 10, bias=False)  # 4,000 bytes, and as many of gradient
    data, second = torch.ones(1, 100), torch.ones(500)
    step = parts["steps"].Step(lambda: model(data).sum(), model, [data])
    alone = parts["peaks"].peak(step, "cpu")
    assert alone.total - alone.over_weights == 4000
    assert alone.over_weights >= 4000 + 400
    step.held = [second]
    assert parts["peaks"].peak(step, "cpu").over_weights == alone.over_weights + 2000


def test_a_bound_is_met_missed_or_not_measured(parts):
    bound = parts["bounds"].Bound
    assert [bound("", 1.05, value).met for value in (1.05, 1.06, None)] == [True, False, None]
    assert bound("", 40, 39.0, at_least=True, unit="%").cells() == ["", "at least 40 %", "39 %", "**no**"]
    peaks = {name: parts["training"].Measured(1, total={"floor": value}) for name, value in (("a", 1), ("b", 2))}
    worst = [line for line in parts["bounds"].training_bounds({"50m": peaks}) if line.value is not None]
    assert [(line.value, line.note, line.met) for line in worst] == [(2, "(b)", False)]


def test_growth_is_that_of_the_worst_stage(parts):
    lines = parts["bounds"].growth_bounds({"a": (1.2, 2000.0), "b": (1.3, 10.0)})
    assert [(line.value, line.note, line.met) for line in lines] == [(1.3, "(b)", False), (2000, "(a)", False)]


def test_a_whole_run(parts, monkeypatch, capsys, tmp_path):
    words = ["--shapes", "tiny", "7b", "--size", "tiny", "--batch", "2", "--rounds", "2", "--peak_tflops", "1"]
    words += ["--parts", "training", "memory", "evaluation", "--output", str(tmp_path / "out.md")]
    words += ["--methods", "NPO + retain, precomputed", "DPO, precomputed", "mmunlearner"]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    threads = torch.get_num_threads()
    try:
        status = parts["run"].main()
    finally:
        torch.set_num_threads(threads)
    written = (tmp_path / "out.md").read_text()
    assert written.strip() == capsys.readouterr().out.strip()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if "|" in line]
    # Each of two shapes has a table of times and one of memory.
    for name, times in (("NPO + retain, precomputed", 4), ("MMUnlearner, random mask", 4), ("DPO, precomputed", 4)):
        assert sum(line[0] == name for line in lines) == times
    timed, remembered = [line for line in lines if line[0] == "DPO, precomputed"][:2]
    assert "-" not in timed and "-" not in remembered  # all four rivals
    bounds = {line[0]: line[1:] for line in lines if len(line) == 4 and line[0][0] != "-"}
    assert bounds.pop("work")[0] == "bound"
    use = next(cells for work, cells in bounds.items() if "utilisation" in work)
    assert use[0] == "at least 40 %" and use[2] == "**no**"  # of the tera-operation a second that was claimed
    assert status == 1
    assert all(cells[1] == "not measured" for cells in bounds.values() if cells is not use)
    assert "Not measured: no --data was given." in written
