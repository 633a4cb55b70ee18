"""Pictures drawn by real pipelines with tiny random weights: seeds, files, filters, kills, processes, bad input."""

import contextlib
import importlib.util
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[generate]' -c constraints.txt")

from biasunlearn_trainer.data_builders import build as building
from biasunlearn_trainer.data_builders.build_recipe import BuildRecipeError, read_build_recipe
from biasunlearn_trainer.data_builders.catalogue import SOURCES
from biasunlearn_trainer.data_builders.counterfactual_image import CounterfactualImages
from biasunlearn_trainer.data_builders.debias_benchmark import DebiasBenchmark
from biasunlearn_trainer.data_builders.parts import has_values
from biasunlearn_trainer.data_builders.rephrase_image import RephraseImage
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.data_builders.stages import StageError, run_stages, stage_id


def _load_tiny():
    name = "tiny_diffusion_for_tests"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny_diffusion.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _load_tiny()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save_pipeline(folder / "sd")
    tiny.save_pipeline(folder / "flags", flags=True)
    tiny.save_pipeline(folder / "unchecked", flags=None)
    tiny.save_pipeline(folder / "edits", edits=True)
    tiny.save_clip(folder / "clip")
    return folder


def draw_picture(path, seed=0, size=(48, 32)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BILINEAR).save(path)
    return str(path)


@pytest.fixture
def rows(tmp_path):
    captions = [" A man on a bus.", " A woman in a bank.", " A boy by the sea.", " An actress in a car."]
    return [
        {
            "prompt": "Caption:",
            "completion": caption,
            "images": [draw_picture(tmp_path / f"picture {number}.png", number)],
            "bias_type": "gender",
            "polarity": ("stereotype", "anti_stereotype")[number % 2],
            "kind": "reliability",
            "source": "mine",
            "source_id": str(number),
            "pair_id": f"pair {number}",
        }
        for number, caption in enumerate(captions)
    ]


def make(saved, pipeline="sd", stage=RephraseImage, **options):
    return stage(pipeline=str(saved / pipeline), steps=2, **options)


def run(stage, rows, folder):
    rejects = []
    out = list(run_stages(rows, [stage], folder, rejects.append))
    return out, [(reject.reason, reject.detail) for reject in rejects]


def pixels(row_or_path):
    path = row_or_path["images"][0] if isinstance(row_or_path, dict) else row_or_path
    return np.asarray(PIL.Image.open(path)).astype(int)


def provenance(row):
    return json.loads(Path(row["images"][0]).with_suffix(".json").read_text())


def test_a_row_gets_a_new_picture_and_keeps_the_rest(saved, rows, tmp_path):
    out, rejects = run(make(saved, kind="v_generality", keep_rows=True), rows, tmp_path / "s")
    assert rejects == []
    assert out[::2] == rows
    for row, new in zip(rows, out[1::2], strict=True):
        drawn = {"drawn_by": "sd", "drawn_prompt": row["completion"].strip(), "drawn_seed": new["drawn_seed"]}
        assert new == {**row, **drawn, "kind": "v_generality", "images": new["images"]}
        assert pixels(new).shape == (tiny.SIDE, tiny.SIDE, 3)


def test_pictures_are_a_function_of_seed_and_row(saved, rows, tmp_path):
    first, _ = run(make(saved), rows, tmp_path / "a")
    again, _ = run(make(saved), rows[::-1], tmp_path / "b")
    other, _ = run(make(saved, seed=1), rows, tmp_path / "c")
    together, _ = run(make(saved, batch_size=4), rows, tmp_path / "d")
    for row, same in zip(first, again[::-1], strict=True):
        assert (pixels(row) == pixels(same)).all()
        assert row["drawn_seed"] == same["drawn_seed"]
    assert len({row["drawn_seed"] for row in first + other}) == 8
    assert not any((pixels(row) == pixels(changed)).all() for row, changed in zip(first, other, strict=True))
    # Noise is drawn a picture at a time: a batch changes no more than the last bit of a pixel.
    for row, batched in zip(first, together, strict=True):
        assert np.abs(pixels(row) - pixels(batched)).max() <= 1
    # The same caption of another item is another picture; the same item asked twice has one.
    twice = [rows[0], {**rows[0], "source_id": "9"}, {**rows[0], "prompt": "Say what you see:"}]
    out, _ = run(make(saved), twice, tmp_path / "e")
    assert not (pixels(out[0]) == pixels(out[1])).all()
    assert out[0]["images"] == out[2]["images"]


@pytest.mark.parametrize("task", ["text_to_image", "image_to_image", "instruct"])
def test_a_picture_is_drawn_again_from_its_provenance_alone(saved, rows, tmp_path, task):
    import diffusers
    import torch

    if task == "instruct":
        stage = make(saved, "edits", CounterfactualImages, image_guidance_scale=1.2)
    else:
        more = {"strength": 0.6, "size": 24} if task == "image_to_image" else {}
        stage = make(saved, task=task, guidance_scale=3.0, negative_prompt="blur", **more)
    out, _ = run(stage, rows[:1], tmp_path / "s")
    record = provenance(out[-1])
    assert record["task"] == task
    assert record["safety_checker"] == "StableDiffusionSafetyChecker"
    call = dict(record["call"])
    size = (call.pop("width"), call.pop("height"))
    if task == "text_to_image":
        given = {"width": size[0], "height": size[1]}
    else:
        with PIL.Image.open(rows[0]["images"][0]) as original:
            given = {"image": original.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)}
        assert record["original"]["name"] == "picture 0.png"
        # 48 x 32 pixels, the longer side as asked for or as the pipeline was trained, both multiples of 8.
        assert size == ((24, 16) if task == "image_to_image" else (32, 24))
    pipe = getattr(diffusers, record["class"]).from_pretrained(saved / record["pipeline"])
    generator = torch.Generator("cpu").manual_seed(record["seed"])
    again = pipe(prompt=record["prompt"], generator=generator, **call, **given).images[0]
    assert (np.asarray(again).astype(int) == pixels(out[-1])).all()


def test_what_the_checker_flags_never_goes_on(saved, rows, tmp_path, caplog):
    out, rejects = run(make(saved, "flags"), rows, tmp_path / "a")
    assert out == []
    assert rejects[0] == ("flagged by the safety checker", "A man on a bus.")
    assert not list((tmp_path / "a").rglob("*.png"))
    assert "switched off" not in caplog.text
    out, rejects = run(make(saved, "flags", safety_checker=False), rows, tmp_path / "b")
    assert len(out) == 4
    assert provenance(out[0])["safety_checker"] == "switched off"
    assert "the safety checker was switched off" in caplog.text


def test_a_pipeline_without_a_checker_is_said_once(saved, rows, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        out, _ = run(make(saved, "unchecked"), rows, tmp_path)
    assert provenance(out[0])["safety_checker"] == "none in this pipeline"
    assert caplog.text.count("has no safety checker") == 1


def test_blank_pictures_never_go_on(saved, rows, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(saved / "sd")
    for weight in pipe.vae.decoder.conv_out.parameters():
        torch.nn.init.zeros_(weight)
    pipe.save_pretrained(tmp_path / "blank")
    _, rejects = run(make(tmp_path, "blank"), rows[:1], tmp_path / "s")
    assert rejects == [("blank picture", "all (128, 128, 128) A man on a bus.")]


@pytest.mark.parametrize("compare_with", ["prompt", "original"])
def test_pictures_that_are_not_alike_are_left_out(saved, rows, tmp_path, compare_with):
    filtered = {"clip_model": str(saved / "clip"), "compare_with": compare_with, "task": "image_to_image"}
    out, _ = run(make(saved, min_similarity=-1.0, **filtered), rows, tmp_path / "a")
    found = [row["drawn_similarity"] for row in out]
    assert len(set(found)) == 4
    between = sorted(found)[1]
    kept, rejects = run(make(saved, min_similarity=between, **filtered), rows, tmp_path / "b")
    assert [row["drawn_similarity"] for row in kept] == [value for value in found if value >= between]
    assert rejects == [("not alike", f"similarity {min(found):.3f} to the {compare_with}: {r}") for r in
                       [row["drawn_prompt"] for row in out if row["drawn_similarity"] == min(found)]]  # fmt: skip
    assert provenance(kept[0])["similarity"] == kept[0]["drawn_similarity"]
    assert provenance(kept[0])["compare_with"] == compare_with


def test_the_similarity_is_that_of_the_clip_model(saved, rows, tmp_path):
    import torch
    from transformers import CLIPModel, CLIPProcessor

    filtered = {"clip_model": str(saved / "clip"), "min_similarity": -1.0}
    out, _ = run(make(saved, **filtered), rows[:1], tmp_path)
    model, processor = CLIPModel.from_pretrained(saved / "clip"), CLIPProcessor.from_pretrained(saved / "clip")
    picture = PIL.Image.open(out[0]["images"][0])
    inputs = processor(text=["A man on a bus."], images=[picture], return_tensors="pt")
    with torch.no_grad():
        logit = model(**inputs).logits_per_image.item()
    assert out[0]["drawn_similarity"] == pytest.approx(logit / model.logit_scale.exp().item(), abs=1e-5)


def test_a_picture_is_tried_again_with_another_seed(saved, rows, tmp_path):
    filtered = {"clip_model": str(saved / "clip"), "max_attempts": 3}
    stage = make(saved, min_similarity=0.999, **filtered)
    rejects = []
    assert list(run_stages(rows[:2], [stage], tmp_path, rejects.append)) == []
    assert [(reject.reason, reject.attempts) for reject in rejects] == [("not alike", 3)] * 2
    store = tmp_path / f"{stage_id(stage)}.jsonl"
    details = [json.loads(line)["value"]["detail"] for line in store.read_text().splitlines()]
    assert len(set(details)) == 6


def test_long_captions_are_counted_never_cut(saved, rows, tmp_path):
    # One token a letter, one each for begin and end: 75 letters are the limit.
    captions = ["a" * 75, "a" * 76]
    out, rejects = run(make(saved), [{**rows[0], "completion": text} for text in captions], tmp_path)
    assert [row["completion"] for row in out] == captions[:1]
    assert rejects == [("over the text encoder's limit", f"78 tokens, tokenizer takes 77: {'a' * 76}")]


def test_pictures_that_do_not_open_are_left_out_and_the_build_goes_on(saved, rows, tmp_path):
    broken, empty = tmp_path / "broken.png", tmp_path / "empty.png"
    broken.write_bytes(Path(rows[0]["images"][0]).read_bytes()[:200])
    empty.write_bytes(b"")
    bad = [[str(broken)], [str(empty)], [str(tmp_path / "absent.png")], [], rows[0]["images"] * 2]
    given = [{**rows[0], "images": images, "source_id": str(n)} for n, images in enumerate(bad)] + [rows[1]]
    stage = make(saved, task="image_to_image", prompt="a photo")
    out, rejects = run(stage, given, tmp_path / "s")
    assert [row["source_id"] for row in out] == ["1"]
    reasons = [reason for reason, _ in rejects]
    assert reasons == ["picture cannot be opened"] * 3 + ["no picture", "several pictures"]
    assert "'broken.png' cannot be read" in rejects[0][1]
    assert "'absent.png' does not exist" in rejects[2][1]
    # Mended, it is drawn, without anything being removed by hand.
    shutil.copy(rows[2]["images"][0], broken)
    out, _ = run(make(saved, task="image_to_image", prompt="a photo"), given[:1], tmp_path / "s")
    assert len(out) == 1


def test_rows_without_the_column_are_left_out(saved, rows, tmp_path):
    out, rejects = run(make(saved, prompt="{scene}, {source}"), [rows[0], {**rows[1], "scene": "a bus"}], tmp_path)
    assert [row["drawn_prompt"] for row in out] == ["a bus, mine"]
    assert rejects == [("nothing to draw from", "the row has no `scene`")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a photo"}, "`prompt` is 'a photo', without a slot"),
        ({"prompt": "a {photo"}, "`prompt` is 'a {photo'"),
        ({"prompt": "{0}"}, "expected names in braces"),
        ({"strength": 0.5}, "`strength` belongs to image_to_image"),
        ({"task": "image_to_image", "strength": 0.0}, "`strength` must be above 0"),
        ({"size": 500}, "`size` must be a multiple of 8, got 500; nearest: 496"),
        ({"min_similarity": 2.0}, "`min_similarity` must be in -1..1"),
        ({"max_attempts": 0}, "`max_attempts` must be 1 or more"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be 0 or more"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(saved, options, message):
    with pytest.raises(ValueError, match=message.replace("(", "[(]").replace("{", "[{]")):
        make(saved, **options)


def test_wrong_ids_are_named(saved, rows, tmp_path, monkeypatch):
    import huggingface_hub.constants

    with pytest.raises(ValueError, match=r"neither a folder that is there nor a Hub id .*nearest there: sd"):
        make(saved, "sdd")
    with pytest.raises(ValueError, match=r"a folder without model_index.json"):
        make(saved, "clip")
    with pytest.raises(StageError, match=r"cannot be loaded for image_to_image: .*InstructPix2Pix"):
        run(make(saved, "edits", task="image_to_image"), rows, tmp_path)
    with pytest.raises(StageError, match=r"StableDiffusionPipeline .* takes no `image`, which instruct needs"):
        run(make(saved, "sd", CounterfactualImages), rows, tmp_path)
    with pytest.raises(StageError, match=r"`clip_model` '.*sd/text_encoder' cannot be loaded|is a CLIPText"):
        run(make(saved, clip_model=str(saved / "sd/text_encoder")), rows, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StageError, match="the pipeline 'nobody/nothing' cannot be loaded for text_to_image"):
        run(RephraseImage(pipeline="nobody/nothing"), rows, tmp_path)


def test_a_variation_without_a_step_is_said(saved, rows, tmp_path):
    with pytest.raises(StageError, match=r"2 step\(s\) with `strength` 0.4 leave none to draw"):
        run(make(saved, task="image_to_image", strength=0.4), rows, tmp_path)
    out, _ = run(make(saved, task="image_to_image", strength=0.5), rows[:1], tmp_path)
    assert len(out) == 1


class Burglar:
    """A pickle that does something when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("part", ["unet", "clip"])
def test_pickled_weights_are_refused_and_never_read(saved, rows, tmp_path, part):
    trace = tmp_path / "burglary"
    shutil.copytree(saved / "sd", tmp_path / "sd")
    shutil.copytree(saved / "clip", tmp_path / "clip")
    weights = {"unet": "sd/unet/diffusion_pytorch_model", "clip": "clip/model"}[part]
    (tmp_path / f"{weights}.safetensors").unlink()
    bad = {"unet": tmp_path / f"{weights}.bin", "clip": tmp_path / "clip/pytorch_model.bin"}[part]
    bad.write_bytes(pickle.dumps(Burglar(trace)))
    with pytest.raises(StageError, match=r"cannot be loaded.*safetensors"):
        run(make(tmp_path, clip_model=str(tmp_path / "clip")), rows, tmp_path / "s")
    assert not trace.exists()


@pytest.mark.parametrize("where", ["pipeline", "component"])
def test_code_that_comes_with_a_pipeline_is_not_run(saved, rows, tmp_path, where):
    trace = tmp_path / "burglary"
    shutil.copytree(saved / "sd", tmp_path / "sd")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    code = tmp_path / ("sd/mine.py" if where == "pipeline" else "sd/unet/mine.py")
    code.write_text(f"open({str(trace)!r}, 'w')\nfrom diffusers import StableDiffusionPipeline as Mine\n")
    index["_class_name" if where == "pipeline" else "unet"] = ["mine", "Mine"]
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    with pytest.raises(StageError, match="cannot be loaded"):
        run(make(tmp_path, "sd", CounterfactualImages), rows, tmp_path / "s")
    with pytest.raises(StageError, match="cannot be loaded"):
        run(make(tmp_path), rows, tmp_path / "s")
    assert not trace.exists()


def test_counterfactual_pictures_go_both_ways(saved, rows, tmp_path):
    out, rejects = run(make(saved, "edits", CounterfactualImages), rows, tmp_path / "s")
    assert rejects == []
    assert [row["images"] for row in out[::2]] == [row["images"] for row in rows]
    assert [(row["demographic"], row["counterfactual"], row["polarity"], row["completion"]) for row in out] == [
        ("male", False, "stereotype", " A man on a bus."),
        ("female", True, "anti_stereotype", " A woman on a bus."),
        ("female", False, "anti_stereotype", " A woman in a bank."),
        ("male", True, "stereotype", " A man in a bank."),
        ("male", False, "stereotype", " A boy by the sea."),
        ("female", True, "anti_stereotype", " A girl by the sea."),
        ("female", False, "anti_stereotype", " An actress in a car."),
        ("male", True, "stereotype", " An actor in a car."),
    ]
    assert [row["drawn_prompt"] for row in out[1::2]] == [
        "make it a woman on a bus",
        "make it a man in a bank",
        "make it a girl by the sea",
        "make it an actor in a car",
    ]
    assert all(a["pair_id"] == b["pair_id"] for a, b in zip(out[::2], out[1::2], strict=True))
    assert len({row["pair_id"] for row in out}) == 4


def test_counterfactuals_of_questions_take_a_column_that_says_who_is_seen(saved, rows, tmp_path):
    row = {
        **rows[0],
        "prompt": "Question: Is he early or late? Answer:",
        "completion": " Late.",
        "scene": "a photo of an old man, bus",
    }
    options = {"caption": "scene", "task": "image_to_image", "strength": 0.8, "prompt": "{after}, {caption}"}
    out, _ = run(make(saved, "sd", CounterfactualImages, **options), [row], tmp_path / "a")
    assert out[1]["drawn_prompt"] == "woman, a photo of an old woman, bus"
    assert out[1]["prompt"] == "Question: Is she early or late? Answer:"
    assert (out[1]["completion"], out[1]["scene"]) == (" Late.", "a photo of an old woman, bus")
    aged = {**row, "bias_type": "other", "prompt": "Q"}
    options = {"caption": "scene", "bias_type": "age", "to": "young", "prompt": "turn {before} into {after} ({group})"}
    out, _ = run(make(saved, "edits", CounterfactualImages, **options), [aged], tmp_path / "b")
    assert out[1]["drawn_prompt"] == "turn old into young (young)"
    assert [r["bias_type"] for r in out] == ["age", "age"]


def test_counterfactual_pictures_that_cannot_be_told_are_left_out(saved, rows, tmp_path):
    bad = [
        {**rows[0], "completion": " A bus."},
        {**rows[0], "bias_type": None},
        {**rows[0], "completion": " He called her fat."},
        {**rows[0], "completion": " Late.", "prompt": "Is the man late?"},
        {**rows[0], "images": []},
    ]
    out, rejects = run(make(saved, "edits", CounterfactualImages), bad, tmp_path)
    assert out == []
    assert [reason for reason, _ in rejects] == ["no_term", "no_bias_type", "ambiguous_her", "no_term", "no picture"]


def test_the_benchmark_gets_its_redrawn_rows(saved, data_dir, tmp_path):
    pairs = SOURCES["pairs"].read(data_dir / "pairs", sections=["potential_crime"])
    pairs = [row for row in pairs if row["pair_id"].endswith(("bandanna", "window"))]
    assert len(pairs) == 2 * 4 * 3
    where = {"task": "vqa", "kind": "reliability", "polarity": "anti_stereotype"}
    stage = make(saved, prompt="{scene}", kind="v_generality", keep_rows=True)
    stage.where = where
    out = list(run_stages(pairs, [DebiasBenchmark(), stage], tmp_path, lambda reject: None))
    counts = Counter((row["kind"], row["polarity"]) for row in out)
    assert counts == {
        ("reliability", "stereotype"): 8,
        ("reliability", "anti_stereotype"): 8,
        ("t_generality", "anti_stereotype"): 8,
        ("v_generality", "anti_stereotype"): 8,
    }
    redrawn = [row for row in out if row["kind"] == "v_generality"]
    assert redrawn[0]["drawn_prompt"] == "a photo of a black man, bandanna"
    # The item, its biased sentence and its wording stay: only the picture is another one.
    for row in redrawn:
        twin = next(r for r in out if has_values(r, where) and r["source_id"] == row["source_id"])
        assert all(row[name] == twin[name] for name in ("prompt", "completion", "rejected", "pair_id"))
        assert row["images"] != twin["images"]


def write_recipe(folder, rows, saved, name="mine", **stage):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"stage": "rephrase_image", "pipeline": str(saved / "sd"), "steps": 2, **stage}
    recipe = {
        "name": name,
        "sources": [{"source": "rows", "path": str(folder / "rows.jsonl"), "licence": "CC BY 4.0"}],
        "stages": [options],
        "splits": {"train": {}},
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def many(rows, num):
    return [{**rows[n % 4], "source_id": str(n), "pair_id": f"p{n}"} for n in range(num)]


def test_a_build_holds_the_pictures_and_shows_them(saved, rows, tmp_path, capsys):
    path = write_recipe(tmp_path, rows, saved, kind="v_generality", keep_rows=True, where={"polarity": "stereotype"})
    assert building.main([str(path), "--preview", "2"]) == 0
    assert "preview_contact_sheet.png" in capsys.readouterr().out
    report = building.build(read_build_recipe(path), show_progress=False)
    built = load_rows(tmp_path / "mine/data/train.parquet")
    assert [row["kind"] for row in built] == ["reliability", "v_generality", "reliability"] * 2
    assert report.stages[0]["rows_out"] == 6
    # Four pictures in a line of the sheet, two in the next.
    sheet = PIL.Image.open(tmp_path / "mine/contact_sheet.png")
    assert sheet.width > 4 * 200
    card = (tmp_path / "mine/README.md").read_text()
    assert "pipeline='sd'" in card
    assert str(saved) not in card + (tmp_path / "mine/build.json").read_text()
    # The folder may be moved; then the pictures are still found and none is drawn again.
    shutil.move(tmp_path / "mine", tmp_path / "moved")
    recipe = read_build_recipe(path, ["--output_dir", str(tmp_path / "moved")])
    recipe.stages[0]._diffusion.load = None
    assert building.build(recipe, show_progress=False).splits["train"].fingerprint == report.splits["train"].fingerprint
    next(iter((tmp_path / "moved/.cache").rglob("*.png"))).unlink()
    with pytest.raises(StageError, match="was drawn and is gone"):
        building.build(recipe, show_progress=False)


def test_faults_of_the_stages_are_faults_of_the_recipe(saved, rows, tmp_path):
    path = write_recipe(tmp_path, rows, saved, pipeline=str(saved / "sdd"), size=100, safety="off")
    with pytest.raises(BuildRecipeError, match="did you mean `safety_checker`"):
        read_build_recipe(path)
    path = write_recipe(tmp_path, rows, saved, pipeline=str(saved / "sdd"))
    with pytest.raises(BuildRecipeError, match="nearest there: sd"):
        read_build_recipe(path)


def test_a_killed_build_draws_nothing_twice(saved, rows, tmp_path):
    given = many(rows, 12)
    undisturbed = building.build(read_build_recipe(write_recipe(tmp_path, given, saved, "whole")), show_progress=False)
    path = write_recipe(tmp_path, given, saved)
    store = tmp_path / "mine/.cache" / f"{stage_id(read_build_recipe(path).stages[0])}.jsonl"
    child = os.fork()
    if child == 0:
        # A child that ends in any other way would go on with the tests.
        try:
            import torch

            torch.set_num_threads(1)
            building.build(read_build_recipe(path), show_progress=False)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while (not store.exists() or store.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    stored = store.read_text().splitlines(keepends=True)
    stored = [json.loads(line)["key"] for line in stored if line.endswith("\n")]
    assert 3 <= len(stored) < 12
    recipe = read_build_recipe(path)
    drawn = []
    draw = recipe.stages[0]._diffusion.draw
    recipe.stages[0]._diffusion.draw = lambda drawings: drawn.extend(drawings) or draw(drawings)
    report = building.build(recipe, show_progress=False)
    assert len(drawn) == 12 - len(stored)
    assert report.splits["train"].fingerprint == undisturbed.splits["train"].fingerprint


@contextlib.contextmanager
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def launched(path, launcher):
    """Builds in two processes, launched by torchrun or, which saves its start, as it launches them."""
    python, build = [sys.executable], ["-m", "biasunlearn_trainer.data_builders.build", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        given = [([*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *build], env)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        given = [(python + build, {**env, **place, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    running = [subprocess.Popen(command, env=own, **pipes) for command, own in given]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        # Of a launch that hangs the processes, too.
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return max(abs(process.returncode) for process in running), *("".join(texts) for texts in zip(*said, strict=True))


@pytest.mark.parametrize("launcher", ["environment", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_build_what_one_builds(saved, rows, tmp_path, launcher):
    given = [*many(rows, 7), {**rows[0], "source_id": "long", "completion": "a" * 80}]
    with one_thread():  # as the launched ones; other numbers of threads round otherwise
        alone = building.build(read_build_recipe(write_recipe(tmp_path, given, saved, "alone")), show_progress=False)
    path = write_recipe(tmp_path, given, saved, "together")
    # What a killed build of several processes left is taken in: here the third one's share of one picture.
    cache, left = tmp_path / "together/.cache", tmp_path / "alone/.cache"
    name = stage_id(read_build_recipe(path).stages[0])
    shutil.copytree(left / name, cache / name)
    lines = (left / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (cache / f"{name}.rank2.jsonl").write_text(lines[0] + lines[1][:40])
    for picture in (cache / name).glob("*.*"):
        if picture.stem != json.loads(lines[0])["key"]:
            picture.unlink()
    kept = next((cache / name).glob("*.png"))
    before = kept.stat().st_mtime_ns
    code, told, errors = launched(path, launcher)
    assert code == 0, errors
    assert told.count("together/data/train.parquet: 7 rows") == 1
    assert "over the text encoder's limit 1" in told
    report = json.loads((tmp_path / "together/build.json").read_text())["report"]
    assert report["splits"]["train"]["fingerprint"] == alone.splits["train"].fingerprint
    assert report["rejects"] == alone.rejects
    assert kept.stat().st_mtime_ns == before
    assert sorted(file.name for file in cache.glob("*.*")) == ["build.lock", f"{name}.jsonl"]


@pytest.mark.slow
def test_a_fault_in_one_process_ends_them_all(saved, rows, tmp_path):
    options = {"pipeline": str(saved / "edits"), "task": "image_to_image", "strength": 0.5}
    path = write_recipe(tmp_path, many(rows, 4), saved, **options)
    code, _, errors = launched(path, "torchrun")
    assert code != 0
    assert "cannot be loaded for image_to_image" in errors
    code, _, errors = launched(tmp_path / "absent.yaml", "torchrun")
    assert code != 0
    assert errors.count("no such recipe") == 1
