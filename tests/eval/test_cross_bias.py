"""The cross-bias matrix: numbers by hand, what is missing, the command, and a picture in which nothing overlaps."""

import json

import pytest

from biasunlearn_trainer.eval.cross_bias import cross_bias_markdown, cross_bias_matrix, main
from biasunlearn_trainer.eval.metrics import share
from biasunlearn_trainer.eval.report.cross_bias import build_cross_bias_figure
from biasunlearn_trainer.eval.schema import EvalResult, TaskResult, save_results

TASK = "debias_ic@report"


def result(**right_of_ten):
    groups = {name: {"reliability": share([i < right for i in range(10)])} for name, right in right_of_ten.items()}
    return EvalResult(model="m", tasks={TASK: TaskResult({}, groups)})


BEFORE = result(race=0, gender=1, religion=2)
RUNS = {"race": result(race=9, gender=4, religion=2), "gender": result(race=5, gender=10)}


def test_the_matrix_by_hand():
    matrix = cross_bias_matrix(RUNS, TASK, before=BEFORE)
    assert matrix.unlearned == ("race", "gender") and matrix.measured == ("race", "gender", "religion")
    assert matrix.entries["race", "gender"].value == 0.4 and matrix.entries["gender", "race"].value == 0.5
    assert matrix.entries["gender", "gender"].n == 10
    assert matrix.change("race", "gender") == pytest.approx(0.3)
    assert matrix.change("gender", "religion") is None, "religion was not measured after unlearning gender"
    assert matrix.carried_over("race") == pytest.approx((0.4 + 0.2) / 2)
    assert matrix.carried_over("gender") == 0.5


def test_the_table():
    lines = cross_bias_markdown(cross_bias_matrix(RUNS, TASK, before=BEFORE)).splitlines()
    assert lines[2] == "| unlearned | race | gender | religion | mean of the others |"
    assert lines[4].startswith("| nothing (before) | 0.00 [0.00, 0.28], n = 10 |")
    # Wilson's interval of 4 of 10 is 0.17 to 0.69.
    assert lines[5] == (
        "| race | **0.90** [0.60, 0.98], n = 10 | 0.40 [0.17, 0.69], n = 10 | 0.20 [0.06, 0.51], n = 10 | 0.30 |"
    )
    assert lines[6].endswith("|  | 0.50 |"), "a cell that was not measured is empty"


def test_a_single_run_without_others():
    matrix = cross_bias_matrix({"race": result(race=9)}, TASK)
    assert matrix.carried_over("race") is None and matrix.before == {}
    assert cross_bias_markdown(matrix).count("\n") == 4


def test_faults_come_together():
    runs = {**RUNS, "age": EvalResult(model="m", tasks={}), "religion": result()}
    with pytest.raises(ValueError) as err:
        cross_bias_matrix(runs, TASK)
    assert "age: there is no task" in str(err.value) and "religion: debias_ic@report has no" in str(err.value)
    with pytest.raises(ValueError, match="has no 'reliablity' by bias type; there are: reliability"):
        cross_bias_matrix(RUNS, TASK, "reliablity")
    with pytest.raises(ValueError, match="at least one run"):
        cross_bias_matrix({}, TASK)


@pytest.fixture
def runs(tmp_path):
    """Folders of finished runs, and one lone result."""
    for name, after in RUNS.items():
        (tmp_path / name).mkdir()
        save_results({"before": BEFORE, "after": after}, tmp_path / name / "results.json")
    save_results(result(race=3, religion=8), tmp_path / "religion.json")
    return [f"{name}={tmp_path / name}" for name in RUNS] + [f"religion={tmp_path / 'religion.json'}"]


def test_the_command(runs, tmp_path, capsys):
    figure, output = tmp_path / "matrix.png", tmp_path / "matrix.json"
    assert main([*runs, "--task", TASK, "--figure", str(figure), "--output", str(output)]) == 0
    assert "| religion | 0.30 [0.11, 0.60], n = 10 |  | **0.80**" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = json.loads(output.read_text())
    assert written["after"]["race"]["gender"]["value"] == 0.4 and written["before"]["gender"]["value"] == 0.1


def test_the_command_says_what_is_wrong(runs, tmp_path, capsys):
    save_results({"before": BEFORE}, tmp_path / "unfinished.json")
    for given, said in (
        (["race"], "expected LABEL=RUN"),
        ([runs[0], runs[0]], "'race' is given twice"),
        ([f"age={tmp_path / 'gone'}"], "age: there is no result at"),
        ([f"age={tmp_path / 'unfinished.json'}"], "holds no result after unlearning; it has: before"),
    ):
        assert main([*given, "--task", TASK]) == 2
        assert said in capsys.readouterr().err


def test_the_picture_is_readable(readable_texts):
    names = ("race", "sexual_orientation", "physical_appearance")
    runs = {name: result(**dict.fromkeys(names[: place + 1], 7)) for place, name in enumerate(names)}
    texts = readable_texts(build_cross_bias_figure(cross_bias_matrix(runs, TASK, before=result(race=1))))
    assert texts.count("not measured") == 3 + 2, "three cells after unlearning, two before"
    assert "0.70" in texts and "nothing (before)" in texts
    readable_texts(build_cross_bias_figure(cross_bias_matrix({"age": result(age=1)}, TASK)))
