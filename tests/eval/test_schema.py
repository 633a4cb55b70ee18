import json

import pytest

from biasunlearn_trainer.eval.schema import (
    SCHEMA_VERSION,
    EvalResult,
    MetricValue,
    TaskResult,
    load_results,
    save_results,
)


def example(model: str = "tiny", value: float = 62.5) -> EvalResult:
    ss = MetricValue(value, 40, (51.25, 70.0), None, 50.0)
    facts = MetricValue(1.0, 12, (0.75, 1.0))
    return EvalResult(
        model=model, tasks={"stereoset@report": TaskResult({"ss": ss, "facts": facts}, {"race": {"ss": ss}})}
    )


def test_layout_is_exactly_the_documented_one():
    entry = {"value": 62.5, "n": 40, "ci95": [51.25, 70.0], "higher_is_better": None, "ideal": 50.0}
    assert example().to_dict() == {
        "schema_version": SCHEMA_VERSION,
        "model": "tiny",
        "tasks": {
            "stereoset@report": {
                "metrics": {
                    "ss": entry,
                    "facts": {"value": 1.0, "n": 12, "ci95": [0.75, 1.0], "higher_is_better": True, "ideal": None},
                },
                "groups": {"race": {"ss": entry}},
            }
        },
    }


def test_one_result_survives_the_file(tmp_path):
    path = save_results(example(), tmp_path / "new folder" / "results.json")
    assert load_results(path) == example()
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_named_results_survive_the_file(tmp_path):
    results = {"before": example("old"), "after": example("new", 50.5)}
    path = save_results(results, tmp_path / "results.json")
    assert list(json.loads(path.read_text())) == ["before", "after"]
    assert load_results(path) == results


def test_all_faults_are_named_at_once():
    data = example().to_dict()
    metrics = data["tasks"]["stereoset@report"]["metrics"]
    metrics["ss"] = {**metrics["ss"], "value": float("nan"), "n": 0, "ci95": [70.0, 51.0]}
    del metrics["facts"]["ideal"]
    metrics["facts"]["std"] = 0.1
    with pytest.raises(ValueError) as caught:
        EvalResult.from_dict(data, "some.json")
    message = str(caught.value)
    for part in ("metrics.ss: value", "metrics.ss: n ", "metrics.ss: ci95", "'ideal' is missing", "unknown key 'std'"):
        assert part in message
    assert message.count("some.json: tasks.stereoset@report") == 5


def test_another_version_is_refused():
    with pytest.raises(ValueError, match=f"schema_version 99, this version of the library reads {SCHEMA_VERSION}"):
        EvalResult.from_dict({**example().to_dict(), "schema_version": 99})


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="was not written"):
        save_results(example(value=float("nan")), tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"before": {"model": "x"}}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json|evaluation result"):
        load_results(path)
