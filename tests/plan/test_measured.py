"""What a plan says against what a run really holds, in bytes of tensors, on the CPU."""

import pytest

CASES = {
    "npo lora adapter": {"method": "npo", "use_peft": True, "lora_r": 8, "beta": 0.1},
    "npo full precomputed": {"method": "npo", "beta": 0.1},
    "ga_diff full": {"method": "ga_diff"},
    "kl_min lora": {"method": "kl_min", "use_peft": True, "lora_r": 8},
    "kl_min full second model": {"method": "kl_min"},
    "mmunlearner masked": {"method": "mmunlearner"},
    "mmunlearner masked update": {"method": "mmunlearner", "mask_scope": "update"},
    "biasunlearn lora": {
        "method": "biasunlearn",
        "use_peft": True,
        "lora_r": 8,
        "dynamic_swapping": False,
        "early_stop": False,
    },
    "pubg full": {"method": "pubg"},
    "dpo full precomputed": {"method": "dpo", "beta": 0.1},
}
BOUND = 0.15


def check(planned_and_measured, path, label):
    made, measured = planned_and_measured(path)
    ratio = made.memory.total / measured
    print(f"| {label} | {made.memory.total / 1e6:.1f} | {measured / 1e6:.1f} | {ratio:.3f} |")
    assert abs(ratio - 1) <= BOUND, made
    return made


# The slow test takes all of them, with text and pictures, with checkpointing and without.
SMALL = [
    ("npo lora adapter", "text", False),
    ("ga_diff full", "image", True),
    ("kl_min full second model", "text", True),
    ("mmunlearner masked", "image", False),
    ("mmunlearner masked", "text", False),
]


@pytest.mark.parametrize(("case", "modality", "checkpointing"), SMALL)
def test_the_plan_is_what_a_small_run_holds(case, modality, checkpointing, write_recipe, planned_and_measured):
    path = write_recipe(modality=modality, activation_checkpointing=checkpointing, **CASES[case])
    check(planned_and_measured, path, f"{case}, {modality}, {checkpointing}")


# What differs in kind: adapter, full fine-tuning, a second model, a mask, with text and pictures; then, once each, the
# methods whose passes differ.
TWICE = ("npo lora adapter", "ga_diff full", "kl_min full second model", "mmunlearner masked")
LARGE = [(case, modality, again) for again in (False, True) for case in TWICE for modality in ("text", "image")] + [
    ("npo full precomputed", "image", False),
    ("kl_min lora", "text", True),
    ("mmunlearner masked update", "text", False),
    ("biasunlearn lora", "text", False),
    ("pubg full", "text", False),
    ("dpo full precomputed", "image", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "modality", "checkpointing"), LARGE)
def test_the_plan_is_what_a_run_of_50m_parameters_holds(
    case, modality, checkpointing, write_recipe, planned_and_measured
):
    path = write_recipe(modality=modality, size="50M", activation_checkpointing=checkpointing, **CASES[case])
    made = check(planned_and_measured, path, f"{case}, {modality}{', checkpointing' * checkpointing}")
    assert made.parameters >= 50_000_000
