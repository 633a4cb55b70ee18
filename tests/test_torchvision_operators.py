"""torchvision imports beside a torch for the CPU, and nothing is imported to see to that."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="needs torchvision: pip install -e '.[vision]' -c constraints.txt"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_torchvision
def test_torchvision_imports_whatever_was_imported_first():
    code = """
import sys, transformers, biasunlearn_trainer
from importlib.util import find_spec
assert find_spec("torchvision") and "torch" not in sys.modules, "asking whether it is there imports nothing"
from transformers import Qwen2VLProcessor
import torch, torchvision
from torchvision.transforms.v2.functional import resize
assert resize(torch.ones(3, 8, 8), [4, 4]).shape == (3, 4, 4)
from torchvision.ops import nms
boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
try:
    print(nms(boxes, scores, 0.5).tolist())
except (RuntimeError, NotImplementedError) as err:
    print("ops" in str(err) or "backend" in str(err))
"""
    assert run(code) in ("[0]", "True")  # a torchvision with its operators, or an error that says they are missing


def test_without_torchvision_nothing_changes():
    code = """
import sys, biasunlearn_trainer
from importlib.machinery import PathFinder
PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: None)
try:
    import torchvision
except ModuleNotFoundError as err:
    print(err.name, "torch" in sys.modules)
"""
    assert run(code) == "torchvision False"


def test_the_watch_is_set_once():
    import biasunlearn_trainer.torchvision_operators as operators

    before = len(sys.meta_path)
    operators.watch_import()
    assert len(sys.meta_path) == before
    assert sum(isinstance(finder, operators._BeforeTorchvision) for finder in sys.meta_path) == 1
