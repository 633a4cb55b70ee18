"""Who may import whom, read from the imports themselves."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "biasunlearn_trainer"
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "deepspeed", "diffusers"}

# Module prefix -> what of ours it may import. The longest prefix that fits a module counts.
OURS = {
    "": ("torchvision_operators",),
    "torchvision_operators": (),
    "version": (),
    "run_files": (),
    "cache": (),
    "checkpoints": (),
    "guards": ("checkpoints",),
    "losses": ("losses",),
    "groups": ("sharding",),
    "adapters": (),
    "models": ("adapters", "groups", "models", "sharding"),
    "rows": (),
    "lengths": ("rows",),
    "orders": (),
    "streams": ("lengths", "orders", "rows"),
    "sharding": (),
    "untouched": (),
    "completions": ("losses", "completions"),
    "prefix_trees": (),
    "shared_prefixes": ("losses", "collators", "completions", "prefix_trees"),
    "fingerprints": ("models", "rows", "sharding"),
    "transfer": ("adapters", "models"),
    "converters": ("models",),
    "collators": ("models", "collators"),
    "kept_files": (),
    "kept_items": ("kept_files",),
    "reference_states": ("completions", "kept_files"),
    "image_features": ("completions", "fingerprints", "kept_files", "models"),
    "reference": ("models", "completions", "fingerprints", "sharding"),
    "reference_building": (
        "cache",
        "models",
        "collators",
        "completions",
        "fingerprints",
        "kept_files",
        "reference_states",
        "sharding",
        "streams",
    ),
    "saliency": (
        "losses",
        "cache",
        "models",
        "collators",
        "completions",
        "fingerprints",
        "kept_files",
        "orders",
        "streams",
        "saliency",
    ),
    "saliency.changes": ("models", "transfer", "saliency"),
    "saliency.heatmap": ("eval.report", "saliency"),
    "saliency.report": ("eval.schema", "saliency"),
    "saliency.__main__": ("runner",),
    "trainers": (
        "cache",
        "image_features",
        "lengths",
        "orders",
        "rows",
        "losses",
        "models",
        "streams",
        "collators",
        "completions",
        "fingerprints",
        "reference",
        "reference_building",
        "reference_states",
        "saliency",
        "sharding",
        "untouched",
        "checkpoints",
        "guards",
        "hub",
        "trainers",
    ),
    "testbed": (
        "models",
        "streams",
        "collators",
        "completions",
        "cache",
        "testbed",
        "trainers.base",
        "data_builders",
    ),
    "data_builders": ("data_builders",),
    "eval.schema": ("eval.schema",),
    "eval.metrics": ("eval.metrics", "eval.schema"),
    "eval.evaluate_metrics": ("eval.schema", "eval.metrics", "eval.evaluate_metrics"),
    "eval.compare": (
        "eval.schema",
        "eval.metrics",
        "eval.compare",
        "eval.findings",
        "eval.generalisation",
        "eval.matched_command",
    ),
    "eval.findings": ("eval.schema", "eval.metrics", "eval.findings", "eval.compare"),
    "eval.generalisation": ("eval.findings", "eval.generalisation"),
    "eval.matched": ("eval.metrics",),
    "eval.runs": ("eval.matched", "eval.schema"),
    "eval.matched_command": ("eval.matched", "eval.runs", "eval.report.tradeoff"),
    "eval.cross_bias": ("eval.schema", "eval.report.cross_bias"),
    "eval.batches": ("fingerprints",),
    "eval.passes": ("models", "collators", "shared_prefixes", "streams", "eval.batches"),
    "eval.scoring": ("collators", "completions", "shared_prefixes", "eval.batches", "eval.passes"),
    "eval.tasks": ("models", "collators", "completions", "eval", "data_builders"),
    "eval.report": (
        "eval.schema",
        "eval.metrics",
        "eval.compare",
        "eval.findings",
        "eval.generalisation",
        "eval.cross_bias",
        "eval.matched",
        "eval.report",
        "version",
    ),
    "eval.run": ("models", "collators", "eval", "version"),
    "eval": ("eval",),
    "probes": ("eval", "guards", "models"),
    "model_filter": ("data_builders", "eval", "models"),
    "guidance": ("cache", "models", "fingerprints", "kept_items", "eval", "data_builders", "guidance"),
    "hub": ("eval", "data_builders", "adapters", "models", "fingerprints", "recipe.config", "transfer", "hub"),
    "plan": (
        "adapters",
        "lengths",
        "models",
        "saliency",
        "collators",
        "trainers.config",
        "recipe",
        "runner",
        "sharding",
        "plan",
    ),
    "plan.trainer": ("completions", "reference_states", "saliency", "recipe", "plan"),
    "plan.meter": (),
    "plan.shadow": (),
    "recipe": None,
    "runner": None,
    "tables": (
        "checkpoints",
        "recipe",
        "eval.schema",
        "eval.findings",
        "eval.matched",
        "eval.report",
        "eval.runs",
        "tables",
    ),
    "tables.forked": ("runner", "tables"),
}
# Module prefix -> third-party packages it may import when it is imported itself; None: whatever it likes.
THIRD_PARTY = {
    "": set(),
    "losses": {"torch"},
    "eval.schema": set(),
    "eval.metrics": {"numpy"},
    "eval.evaluate_metrics": {"evaluate", "datasets"},
    "eval.compare": {"numpy"},
    "eval.findings": {"numpy"},
    "eval.generalisation": {"numpy"},
    "eval.matched": {"numpy"},
    "data_builders": {"datasets", "numpy", "PIL", "pyarrow", "huggingface_hub"},
}


def modules():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {PACKAGE: ROOT / PACKAGE}
    for line in setup["options"]["package_dir"].strip().splitlines():
        name, folder = (part.strip() for part in line.split("="))
        folders[name] = ROOT / folder
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(path, module, top_level_only):
    """Absolute names of what a file imports."""
    tree = ast.parse(path.read_text())
    nodes = _outside_functions(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _outside_functions(tree):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _outside_functions(node)


def rule(table, name):
    fits = [prefix for prefix in table if not prefix or name == prefix or name.startswith(prefix + ".")]
    return table[max(fits, key=len)]


MODULES = list(modules())


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _ in MODULES])
def test_imports_keep_to_their_layer(module, path):
    name = module.removeprefix(PACKAGE).lstrip(".")
    allowed, third_party = rule(OURS, name), rule({key: None for key in OURS if key} | THIRD_PARTY, name)
    for target in imports(path, module, top_level_only=False):
        if allowed is not None and target.startswith(PACKAGE + "."):
            inner = target.removeprefix(PACKAGE + ".")
            inside = any(
                inner == layer or inner.startswith(layer + ".") for layer in (*allowed, "version", "run_files")
            )
            assert inside, f"{module} imports {target}; it may import {', '.join(allowed) or 'nothing of ours'}"
    if third_party is not None or name in THIRD_PARTY:
        for target in imports(path, module, top_level_only=True):
            top = target.split(".")[0]
            strangers = HEAVY | {"numpy", "PIL", "matplotlib", "pyarrow", "huggingface_hub", "tqdm"}
            assert top not in strangers - rule(THIRD_PARTY, name), f"{module} imports {top} when it is imported"


def test_a_method_imports_no_other_method():
    shared = {"base", "checkpointing", "config", "masking", "passes", "publishing", "referring", "steering"}
    for module, path in MODULES:
        name = module.removeprefix(f"{PACKAGE}.trainers.")
        if name == module or name in shared | {"registry"}:
            continue
        siblings = {t.split(".")[2] for t in imports(path, module, False) if t.startswith(f"{PACKAGE}.trainers.")}
        assert siblings <= shared, f"{module} imports its siblings {siblings - shared}"


def test_the_package_itself_is_light():
    import subprocess
    import sys

    code = f"import sys, {PACKAGE}; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
