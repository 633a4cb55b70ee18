"""Every metric is loaded for real by `evaluate.load` and gives the pure function's numbers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from biasunlearn_trainer.eval import metrics
from biasunlearn_trainer.eval.evaluate_metrics import METRICS, metric_path


def inputs(num: int = 60) -> dict[str, dict]:
    """Random inputs of every metric, from one seed."""
    rng = np.random.default_rng(0)
    people = [rng.permutation(3) for _ in range(num)]
    ambiguous = rng.random(num) < 0.5
    return {
        "stereoset": {
            **{name: rng.normal(size=num).tolist() for name in ("stereotype", "anti_stereotype", "unrelated")},
            "terms": [f"term {i % 7}" for i in range(num)],
        },
        "crows_pairs": {name: rng.normal(-50, 5, size=num).tolist() for name in ("sent_more", "sent_less")},
        "bbq": {
            "answers": rng.integers(-1, 3, size=num).tolist(),
            "labels": [int(p[2] if a else p[rng.integers(2)]) for p, a in zip(people, ambiguous, strict=True)],
            "unknowns": [int(p[2]) for p in people],
            "targets": [int(p[0]) if i % 9 else -1 for i, p in enumerate(people)],
            "polarities": [("neg", "nonneg")[i % 2] for i in range(num)],
            "conditions": ["ambig" if a else "disambig" for a in ambiguous],
            "templates": [f"t{i % 11}" for i in range(num)],
        },
    }


# In a process of its own: caches go where the environment says, and no network is there to be asked.
LOAD = """
import json, sys
from biasunlearn_trainer.eval.evaluate_metrics import metric_path
import evaluate
results = {}
for name, columns in json.load(sys.stdin).items():
    metric = evaluate.load(metric_path(name))
    results[name] = {
        "once": metric.compute(**columns),
        "named": metric.compute(**columns, name="other") if name != "crows_pairs" else None,
        "description": metric.description,
        "citation": metric.citation,
        "features": sorted(metric.features),
    }
    metric = evaluate.load(metric_path(name))
    for start in (0, 25):
        metric.add_batch(**{key: values[start : start + (25 if not start else 99)] for key, values in columns.items()})
    results[name]["batched"] = metric.compute()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    caches = tmp_path_factory.mktemp("caches")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(caches), "HF_MODULES_CACHE": str(caches / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=json.dumps(inputs()), env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", METRICS)
def test_gives_the_pure_functions_numbers(loaded, name):
    scores = getattr(metrics, f"{name}_scores")(**inputs()[name])
    expected = {}
    for metric, score in scores.items():
        expected |= {metric: score.value, f"{metric}_n": score.n, f"{metric}_ci95": list(score.ci95)}
    assert loaded[name]["once"] == loaded[name]["batched"] == expected
    assert len(expected) >= 3


@pytest.mark.parametrize("name", ["bbq", "stereoset"])
def test_the_name_seeds_the_intervals_alone(loaded, name):
    once, named = loaded[name]["once"], loaded[name]["named"]
    assert {key: value for key, value in once.items() if "ci95" not in key} == {
        key: value for key, value in named.items() if "ci95" not in key
    }
    assert once != named


@pytest.mark.parametrize("name", METRICS)
def test_says_what_it_is(loaded, name):
    assert loaded[name]["features"] == sorted(inputs()[name])
    assert "@inproceedings" in loaded[name]["citation"] and loaded[name]["description"]


@pytest.mark.parametrize("name", METRICS)
def test_the_folder_is_a_space(name):
    import yaml

    folder = metric_path(name)
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        _, front, card = file.read().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["sdk"] == "gradio" and front["tags"] == ["evaluate", "metric"]
    assert os.path.isfile(f"{folder}/{front['app_file']}") and os.path.isfile(f"{folder}/{name}.py")
    with open(f"{folder}/requirements.txt", encoding="utf-8") as file:
        assert {"biasunlearn_trainer", "evaluate>=0.4.6"} <= set(file.read().split())
    assert all(f"`{column}`" in card for column in inputs()[name])


@pytest.mark.parametrize("name", METRICS)
def test_the_cards_example_runs(name):
    import ast
    import re

    with open(f"{metric_path(name)}/README.md", encoding="utf-8") as file:
        card = file.read()
    call = re.search(r"metric\.compute\((.*?)\n\)", card, re.S).group(1)
    columns = {k.arg: ast.literal_eval(k.value) for k in ast.parse(f"f({call})", mode="eval").body.keywords}
    scores = getattr(metrics, f"{name}_scores")(**columns)
    shown = re.search(r"^result(.*)  # (.*)$", card, re.M)
    names = re.findall(r'\["(\w+)"\]', shown.group(1))
    assert [scores[metric].value for metric in names] == [float(value) for value in shown.group(2).split(",")]


def test_unknown_metrics_get_the_nearest_name():
    with pytest.raises(ValueError, match=r"Unknown metric 'crowspairs'. Did you mean 'crows_pairs'\?"):
        metric_path("crowspairs")
