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
]


@pytest.mark.parametrize(("case", "modality", "checkpointing"), SMALL)
def test_the_plan_is_what_a_small_run_holds(case, modality, checkpointing, write_recipe, planned_and_measured):
    path = write_recipe(modality=modality, activation_checkpointing=checkpointing, **CASES[case])
    check(planned_and_measured, path, f"{case}, {modality}, {checkpointing}")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_run_of_50m_parameters_holds(
    case, modality, checkpointing, write_recipe, planned_and_measured
):
    path = write_recipe(modality=modality, size="50M", activation_checkpointing=checkpointing, **CASES[case])
    made = check(planned_and_measured, path, f"{case}, {modality}{', checkpointing' * checkpointing}")
    assert made.parameters >= 50_000_000
