import pytest

from biasunlearn_trainer.eval.tasks import TASKS, load_task, load_tasks, parse_task_spec
from biasunlearn_trainer.eval.tasks.base import draw_evenly, matching_baseline


@pytest.mark.parametrize(
    ("text", "name", "label", "path", "key"),
    [
        ("stereoset", "stereoset", None, None, "stereoset"),
        ("stereoset=a/b.csv", "stereoset", None, "a/b.csv", "stereoset"),
        ("planted@probe=C:/x=1@2", "planted", "probe", "C:/x=1@2", "planted@probe"),
    ],
)
def test_specs(text, name, label, path, key):
    spec = parse_task_spec(text)
    assert (spec.name, spec.label, spec.path, spec.key) == (name, label, path, key)


def test_unknown_task_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"Unknown task 'Stereo-set'.*Did you mean 'stereoset'\?"):
        parse_task_spec("Stereo-set")
    with pytest.raises(ValueError, match=r"There are: planted, .*stereoset"):
        parse_task_spec("xyz=path")


@pytest.mark.parametrize("text", ["stereoset=", "stereoset@", "stereoset@=x"])
def test_empty_parts_are_refused(text):
    with pytest.raises(ValueError, match=r"Empty (path|label) in"):
        parse_task_spec(text)


def test_every_registered_task_can_be_imported():
    import importlib

    from biasunlearn_trainer.eval.tasks import Task

    for module, name in TASKS.values():
        assert issubclass(getattr(importlib.import_module(module), name), Task)


def test_faults_of_all_tasks_come_together(tmp_path):
    with pytest.raises(ValueError) as caught:
        load_tasks(["steroset", "planted", f"stereoset={tmp_path / 'gone'}"])
    for part in ("Did you mean 'stereoset'", "'planted' has no data", "nothing at"):
        assert part in str(caught.value)


def test_two_specs_with_one_key_are_refused(data_dir):
    path = data_dir / "stereoset"
    with pytest.raises(ValueError, match="asked for twice"):
        load_tasks([f"stereoset={path}", f"stereoset={path}"], limit=3)


def test_default_data_may_hold_a_folder_of_the_tasks_name(data_dir):
    rows = load_task("stereoset", data_dir, limit=5).rows
    assert rows == load_task("stereoset", data_dir / "stereoset", limit=5).rows
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_task("stereoset", data_dir, limit=0)


def test_draw_evenly():
    groups = ["a"] * 50 + ["b"] * 3 + ["c"] * 50
    chosen = draw_evenly(groups, 13, "task")
    assert [sum(groups[i] == g for i in chosen) for g in "abc"] == [5, 3, 5]
    assert chosen == sorted(set(chosen)) == draw_evenly(groups, 13, "task")
    assert chosen != draw_evenly(groups, 13, "other task")
    assert draw_evenly(groups, None, "task") == draw_evenly(groups, 999, "task") == list(range(103))


def test_baseline_of_other_items_is_refused():
    items = [{"index": 0}, {"index": 7}]
    assert matching_baseline(items, items[::-1], "planted") == items
    with pytest.raises(ValueError, match=r"planted: the baseline lacks 1 of 2 items \(first: index 7\)"):
        matching_baseline(items, items[:1], "planted")
