"""The arithmetic that a LoRA step cannot do without, and the share of a card's that it reaches.

A matrix product costs 2 operations a weight and token; passed back it costs 2 more, and 2 more for weights that are
trained. So a token costs 4 operations for each frozen weight of the language model's layers and 6 for each of the
adapter's, and a position whose word is predicted 4 for each weight of the head. Causal attention over T tokens of width
H is half of T x T scores: 2 T H a token and layer forward (scores and their use), twice that backward. The image
encoder and the connector are frozen and nothing lies below them: 2 a weight and token, and 4 T H a layer for attention
to all. A reference's forward passes are not counted: they can be done without.
"""

from __future__ import annotations

from shapes import Shape


def layer_weights(hidden_size: int, intermediate_size: int) -> int:
    """Of a Llama layer: four attention matrices and three of the feed-forward part."""
    return 4 * hidden_size**2 + 3 * hidden_size * intermediate_size


def adapter_weights(hidden_size: int, intermediate_size: int, rank: int) -> int:
    """Of an adapter on all seven matrices of such a layer."""
    return rank * (4 * 2 * hidden_size + 3 * (hidden_size + intermediate_size))


def lora_step(shape: Shape, rows: int, tokens: int, kept: int, rank: int) -> int:
    """Floating-point operations of forward and backward passes.

    Args:
        shape: the model's sizes.
        rows: of all streams.
        tokens: of a row, a picture's included.
        kept: positions of a row at which a word is predicted.
        rank: the adapter's.
    """
    width, inner = shape.hidden_size, shape.intermediate_size
    layer = 4 * layer_weights(width, inner) + 6 * adapter_weights(width, inner, rank) + 3 * 2 * tokens * width
    language = tokens * shape.num_layers * layer + kept * 4 * width * shape.vocab_size
    return rows * (language + encoder(shape))


def encoder(shape: Shape) -> int:
    """Operations of one picture's forward pass; the last layer is computed, though the one before it is read."""
    if not shape.image_tokens:
        return 0
    width, patches = shape.vision_hidden_size, shape.image_tokens + 1
    layer = 2 * (4 * width**2 + 2 * width * shape.vision_intermediate_size) + 4 * patches * width
    connector = 2 * (width * shape.hidden_size + shape.hidden_size**2)
    pixels = 2 * 3 * shape.patch_size**2 * width
    return patches * shape.vision_layers * layer + shape.image_tokens * (connector + pixels)


def utilisation(operations: float, seconds: float, peak_tflops: float) -> float:
    """Share of the card's peak, 0 to 1."""
    return operations / seconds / (peak_tflops * 1e12)
