"""Methods at matched forgetting: points chosen by hand, differences by hand, runs read from their folders."""

import json

import pytest
import yaml

from biasunlearn_trainer.eval.matched import Matching, Point, choose_point, compare_matched, matched_markdown, verdict
from biasunlearn_trainer.eval.matched_command import main
from biasunlearn_trainer.eval.runs import figures_of, find_runs, read_points
from biasunlearn_trainer.eval.schema import EvalResult, MetricValue, TaskResult, save_results

MATCHING = Matching({"forget": 0.15}, ("retain", "text"), "task@validation", "task@report")


def point(method="npo", unit="0", setting="lr 1", step=10, forget=0.1, retain=0.9, text=0.8, reported=None):
    figures = {"forget": forget, "retain": retain, "text": text}
    return Point(method, unit, setting, step, figures, reported or figures)


def test_the_point_that_keeps_most_of_those_that_forgot():
    points = [
        point(step=10, forget=0.16, retain=1.0, text=1.0),  # has not forgotten enough
        point(step=20, forget=0.15, retain=0.9, text=0.7),  # keeps 0.80
        point(step=30, forget=0.02, retain=0.8, text=0.84),  # keeps 0.82
        point(step=40, forget=0.00, retain=0.7, text=0.7),
    ]
    assert choose_point(points, MATCHING).step == 30
    assert choose_point(points[:1], MATCHING) is None
    # Of two that keep the same the one with fewer steps.
    assert choose_point([point(step=60), point(step=50)], MATCHING).step == 50


def test_what_chooses_is_not_what_is_reported():
    lucky = point(step=10, retain=1.0, text=1.0, reported={"forget": 0.3, "retain": 0.5, "text": 0.5})
    steady = point(step=20, retain=0.9, text=0.9, reported={"forget": 0.1, "retain": 0.9, "text": 0.9})
    (comparison,) = compare_matched([lucky, steady], MATCHING)
    assert comparison.means["forget"][0] == 0.3 and comparison.means["kept"][0] == 0.5


def test_differences_are_paired_by_unit():
    """Units differ by far more than methods do; pair by pair the one is 0.02 better each time, 0.01 to 0.03."""
    points = []
    for unit, (level, ahead) in enumerate([(0.5, 0.01), (0.7, 0.02), (0.9, 0.03), (0.6, 0.02), (0.8, 0.02)]):
        points.append(point("base", str(unit), retain=level, text=level))
        points.append(point("better", str(unit), retain=level + ahead, text=level))
    base, better = compare_matched(points, MATCHING)
    assert base.differences == {} and base.means["retain"][0] == pytest.approx(0.7)
    mean, (low, high), n = better.differences["retain"]
    assert mean == pytest.approx(0.02) and n == 5 and 0.005 < low < 0.02 < high < 0.035
    assert better.differences["text"][0] == pytest.approx(0)
    assert better.differences["kept"][0] == pytest.approx(0.01)
    assert verdict(better.differences["kept"]) == "keeps more" and verdict(None) == "no common unit"
    assert verdict((0.1, (-0.1, 0.3), 5)) == "undecided" and verdict((-0.2, (-0.3, -0.1), 5)) == "keeps less"


def test_a_unit_on_which_a_method_never_forgets_is_left_out_and_counted():
    points = [point("a", "0"), point("a", "1"), point("b", "0", forget=0.5), point("b", "1", retain=0.7)]
    a, b = compare_matched(points, MATCHING)
    assert len(a.chosen) == 2 and list(b.chosen) == ["1"] and b.differences["retain"][2] == 1
    text = matched_markdown([a, b], MATCHING)
    assert "| a | 2 of 2 |" in text and "| b | 1 of 2 |" in text and "`forget` at most 0.15" in text
    never = [point("a", "0"), point("c", "0", forget=0.9)]
    assert "| c | 0 of 1 | - | - | - | - | - | no common unit |" in matched_markdown(
        compare_matched(never, MATCHING), MATCHING
    )


def test_a_method_that_never_forgets_is_not_what_the_others_are_compared_with():
    points = [point("never", "0", forget=0.9), point("base", "0"), point("better", "0", retain=1.0)]
    matching = Matching(MATCHING.at, MATCHING.keep, MATCHING.choose_on, MATCHING.report_on, against="base")
    text = matched_markdown(compare_matched(points, matching), matching)
    assert "kept minus base" in text and "| never | 0 of 1 | - | - | - | - | - | no common unit |" in text
    assert "| base | 1 of 1 | 0.10 [0.10, 0.10] | 0.90" in text and "| better | 1 of 1 |" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"at": {}}, "`at` is {}"),
        ({"at": {"forget": "low"}}, "highest value of each"),
        ({"keep": "retain"}, "list of metrics"),
        ({"report_on": "task@validation"}, "same task"),
        ({"keeps": 1}, "unknown key `keeps`"),
        ({"choose_on": ...}, "`choose_on` is missing"),
    ],
)
def test_faulty_matchings_are_refused(changes, words):
    given = {"at": {"forget": 0.1}, "keep": ["retain"], "choose_on": "task@validation", "report_on": "task@report"}
    given = {key: value for key, value in {**given, **changes}.items() if value is not ...}
    with pytest.raises(ValueError) as err:
        Matching.of(given)
    assert words in str(err.value)


def test_against_must_be_there():
    with pytest.raises(ValueError, match=r"no method 'mmu'.*there are: npo"):
        compare_matched([point()], Matching({"forget": 0.1}, ("retain",), "a", "b", against="mmu"))
    with pytest.raises(ValueError, match="no points"):
        compare_matched([], MATCHING)


@pytest.fixture
def write_run(tmp_path):
    """`write_run(name, retain by step, **recipe)`: a finished run's folder, with probes of both drawings."""

    def write(name, course, probed=("task@validation", "task@report"), **recipe):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        history = []
        for step, (forget, retain) in course.items():
            figures = {f"probe/{task}/{m}": v for task in probed for m, v in (("forget", forget), ("retain", retain))}
            history += [{"step": step, "loss": 1.0}, {"step": step, **figures}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), **recipe}))
        forget, retain = course[max(course)]
        metrics = {n: MetricValue(v, 10, (v, v), True, 1.0) for n, v in (("forget", forget), ("retain", retain))}
        tasks = {task: TaskResult(metrics, {}) for task in ("task@validation", "task@report")}
        save_results({"after": EvalResult(model="m", tasks=tasks)}, folder / "results.json")
        return folder

    return write


def test_steps_come_from_probes_and_the_last_from_the_results(write_run):
    probed = write_run("probed", {0: (1.0, 1.0), 10: (0.2, 0.9), 20: (0.1, 0.8)})
    assert {step: f["task@report"]["retain"] for step, f in figures_of(probed, ("task@report",)).items()} == {
        0: 1.0,
        10: 0.9,
        20: 0.8,
    }
    bare = write_run("bare", {20: (0.1, 0.8)}, probed=())
    assert list(figures_of(bare, ("task@validation", "task@report"))) == [20]
    with pytest.raises(ValueError, match="no step at which task@validation and other"):
        figures_of(bare, ("task@validation", "other"))


def test_runs_are_told_apart_by_their_recipes(write_run, tmp_path, capsys):
    for seed, keeps in ((0, 0.9), (1, 0.8), (2, 0.85)):
        for rate in (1e-4, 3e-4):
            enough = {10: (0.1 if rate == 3e-4 else 0.5, keeps)}
            write_run(f"npo/{seed}/{rate}", enough, method="npo", learning_rate=rate, seed=seed, beta=0.1)
            better = {10: (0.1, keeps + 0.05)}
            write_run(f"other/{seed}/{rate}", better, method="npo", learning_rate=rate, seed=seed, beta=0.4)
    points = read_points(find_runs([tmp_path]), "task@validation", "task@report")
    assert {p.method for p in points} == {"npo, beta 0.1", "npo, beta 0.4"}
    assert {p.unit for p in points} == {"seed 0", "seed 1", "seed 2"} and len(points) == 12
    picture = tmp_path / "tradeoff.png"
    words = ["--at", "forget=0.15", "--keep", "retain", "--choose_on", "task@validation", "--report_on", "task@report"]
    assert main([str(tmp_path), *words, "--figure", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "| npo, beta 0.4 | 3 of 3 | 0.10 [0.10, 0.10] | 0.90" in said and "+0.05 [+0.05, +0.05] (n 3)" in said
    assert "keeps more" in said and picture.stat().st_size > 1000


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    words = ["--keep", "retain", "--choose_on", "a", "--report_on", "b"]
    assert main([str(tmp_path), "--at", "forget=0.15", *words]) == 2
    assert "No finished run" in capsys.readouterr().err
    assert main([str(tmp_path), "--at", "forget", *words]) == 2
    assert "METRIC=HIGHEST" in capsys.readouterr().err
