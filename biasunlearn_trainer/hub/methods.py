"""Of each method what a card says: what it does, its equation, where that stands."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A method in public words.

    Attributes:
        title: its name.
        summary: what it does, a sentence.
        equation: as the page has it.
        paper: authors or title, and year.
        arxiv: the paper's number.
        place: where in the paper the equation stands.
        page: the file in docs, without its ending.
    """

    title: str
    summary: str
    equation: str
    paper: str
    arxiv: str
    place: str
    page: str


_KEEP = " + retain_weight · { NLL(retain) | KL(ref ‖ theta)(retain) | 0 }"
_NPO = "-(2/beta) · log sigmoid(-beta · [log pi(y|x) - log ref(y|x)])"
_DPO = "L = -log sigmoid( beta · { [log pi - log ref](chosen) - [log pi - log ref](rejected) } )"

METHODS = {
    "ga": Method(
        "GA, gradient ascent",
        "The biased completion is made less likely; nothing is kept on purpose.",
        "L = (1/|y|) · sum_t log pi(y_t | x, y_<t)",
        "Thudi et al. 2022, Unrolling SGD",
        "2109.13398",
        "as MMUnlearner eq. 15",
        "methods/ga",
    ),
    "ga_diff": Method(
        "GA_Diff, gradient difference",
        "Ascent on what must go and descent on what must stay, in one joint step.",
        "L = -forget_weight · NLL(forget) + retain_weight · NLL(retain)",
        "Liu et al. 2022, Continual Learning and Private Unlearning",
        "2203.12817",
        "as MMUnlearner eq. 2 and 16",
        "methods/ga_diff",
    ),
    "kl_min": Method(
        "KL_Min",
        "Ascent on the forget rows, held back by the distance to the model before unlearning on the retain rows.",
        "L = -forget_weight · NLL(forget) + retain_weight · KL(ref ‖ theta)(retain)",
        "Maini et al. 2024, TOFU",
        "2401.06121",
        "as MMUnlearner eq. 17-18",
        "methods/kl_min",
    ),
    "npo": Method(
        "NPO, negative preference optimisation",
        "Ascent with a brake: it fades as a completion becomes less likely than it was before unlearning.",
        f"L = forget_weight · {_NPO}(forget){_KEEP}",
        "Zhang et al. 2024, Negative Preference Optimization",
        "2404.05868",
        "eq. 3",
        "methods/npo",
    ),
    "simnpo": Method(
        "SimNPO",
        "NPO without a reference: the completion's own length-normalised log-probability is the brake.",
        f"L = forget_weight · -(2/beta) · log sigmoid(-(beta/|y|) · log pi(y|x) - delta)(forget){_KEEP}",
        "Fan et al. 2024, Simplicity Prevails",
        "2410.07163",
        "the SimNPO loss",
        "methods/simnpo",
    ),
    "dpo": Method(
        "DPO",
        "The unbiased answer or a refusal is raised above the biased one, relative to the model before unlearning.",
        _DPO,
        "Rafailov et al. 2023, Direct Preference Optimization",
        "2305.18290",
        "eq. 7",
        "methods/dpo",
    ),
    "idk_dpo": Method(
        "IdkDPO",
        "A refusal is raised above the biased answer, relative to the model before unlearning.",
        _DPO,
        "Maini et al. 2024, TOFU",
        "2401.06121",
        "DPO with a refusal as chosen",
        "methods/dpo",
    ),
    "biasunlearn": Method(
        "BiasUnlearn, the dual pathway",
        "Stereotypes are forgotten, their opposites held on to, everything else is kept by a KL; roles are exchanged "
        "where a bias tips over, and the training ends when it is balanced.",
        "L = forget_weight · NPO(S ∪ A') + retain_weight · NLL(A) + utility_weight · KL(ref ‖ theta)(U)",  # noqa: RUF001
        "Mitigating Biases in Language Models via Bias Unlearning, 2025",
        "2509.25673",
        "section 3",
        "methods/biasunlearn",
    ),
    "mmunlearner": Method(
        "MMUnlearner, ascent on salient weights",
        "Ascent through those weights alone that matter more for what must go than for what must stay; descent on what "
        "must stay through all.",
        "m = 1[ S(T) / S(P) >= saliency_threshold ];  "
        "step along -forget_weight · m ⊙ ∇NLL(forget) + retain_weight · ∇NLL(retain)",
        "MMUnlearner: Reformulating Multimodal Machine Unlearning, 2025",
        "2502.11051",
        "eq. 3-7",
        "methods/mmunlearner",
    ),
    "pubg": Method(
        "PUBG, ascent with guided behaviour",
        "The private answer is made less likely, and a safe answer of the original model is put in its place.",
        "L = -forget_weight · NLL(private answer) + guidance_weight · mean_t KL(p* ‖ theta)(safe answer)",
        "Kim, Yang and Jung 2025, Rethinking Post-Unlearning Behavior",
        "2506.02541",
        "ascent and a KL to the original model along reference answers",
        "methods/pubg",
    ),
}
"""By the name that recipes use; where a page says more (presets, defaults), the page holds."""

TRANSFER = Method(
    "Weight transfer",
    "An adapter that removed a bias from a base model was put on its sibling, without any training.",
    "W_sibling + s · B A",
    "Mitigating Biases in Language Models via Bias Unlearning, 2025",
    "2509.25673",
    "weight transfer",
    "weight_transfer",
)
