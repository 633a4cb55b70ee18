"""A stranger's process: loads published models with plain transformers and peft, and writes their logits.

python load_plain.py OUTPUT.pt BASE REPO ...        # an adapter goes on BASE, a whole model loads by itself
"""

import sys
from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # Beside a torch for the CPU, torchvision's operators are missing, and peft imports it.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
            declared.define(f"{name}(Tensor input) -> Tensor")

from huggingface_hub import file_exists
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

output, base, *repos = sys.argv[1:]
found = {}
for repo in repos:
    if file_exists(repo, "adapter_config.json"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
    else:
        model = AutoModelForCausalLM.from_pretrained(repo)
    tokens = AutoTokenizer.from_pretrained(repo)("Who was late 3? The tall one.", return_tensors="pt")
    with torch.no_grad():
        found[repo] = model.eval()(**tokens).logits
assert not [name for name in sys.modules if name.startswith("biasunlearn")]
torch.save(found, output)
