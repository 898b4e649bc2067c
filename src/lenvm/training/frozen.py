"""Training the last layers alone: the frozen ones run once over the data, their output is kept.

Shape legend: H hidden size.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lenvm.data.dataset import Sequences
from lenvm.data.packing import BatchPlan, Hidden, pack
from lenvm.errors import TrainingError
from lenvm.model.value_model import LengthValueModel
from lenvm.training.attention import use_packed_attention


def split_upper(model: LengthValueModel, last_layers: int) -> LengthValueModel:
    """A value model of the last layers and the head, sharing their parameters.

    Raises TrainingError where the backbone is no plain decoder.
    """
    layers = getattr(model.backbone, "layers", None)
    if layers is None:
        raise TrainingError(
            f"{type(model.backbone).__name__} cannot be split; set cache_frozen = false"
        )
    backbone = copy.copy(model.backbone)
    backbone._modules = dict(model.backbone._modules)
    backbone.layers = layers[len(layers) - last_layers :]
    backbone.embed_tokens = nn.Identity()
    upper = copy.copy(model)
    upper._modules = {**model._modules, "backbone": backbone}
    return upper


@torch.no_grad()
def run_frozen(
    model: LengthValueModel,
    sequences: Sequences,
    last_layers: int,
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> Hidden:
    """Output of the frozen layers for every token of the sequences, on the CPU."""
    use_packed_attention(model.backbone)
    layers, norm = model.backbone.layers, model.backbone.norm
    device = next(model.head.parameters()).device
    model.backbone.layers = layers[: len(layers) - last_layers]
    model.backbone.norm = nn.Identity()
    plan = BatchPlan(sequences, batch_tokens, shuffle=False)
    batches = plan.micro_batches(plan.order(0))[0]
    width = int(model.backbone.config.get_text_config().hidden_size)
    kept = Hidden(np.empty((int(sequences.totals.sum()), width), np.uint16), sequences)
    try:
        for done, rows in enumerate(batches):
            batch = pack(sequences, rows).to(device)
            out: Tensor = model.backbone(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                packing=batch.packing,
                use_cache=False,
            ).last_hidden_state[0]
            low = out.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
            ends = np.cumsum(sequences.totals[rows])
            for row, part in zip(rows, np.split(low, ends[:-1]), strict=True):
                kept.tokens(int(row))[:] = part
            progress(done + 1, len(batches))
    finally:
        model.backbone.layers, model.backbone.norm = layers, norm
    return kept
