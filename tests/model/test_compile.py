"""The transformer as one graph of torch.compile, for all sizes of images."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.builders import make_batch, make_detector

SIZES = ([(200, 360)], [(260, 200), (130, 330)], [(256, 256)], [(330, 192)], [(480, 644), (100, 90)], [(224, 128)])
"""Of batches. The sides of the first one's levels are all different: torch.compile takes equal ones for the same."""


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder_layers": 1},
        {"feature_levels": 3, "with_box_refine": True, "two_stage": True},
        {"arch": "detr", "decoder_layers": 1},
    ],
    ids=["base", "two-stage", "detr"],
)
def test_one_graph_serves_all_sizes(settings: dict[str, Any]) -> None:
    model = make_detector(**({"decoder_layers": 2, "dropout": 0.0} | settings)).train()
    batches = [make_batch(sizes * (2 // len(sizes))) for sizes in SIZES]
    expected = [model(batch) for batch in batches]
    torch.compiler.reset()
    counter = CompileCounter()
    model.transformer.compile(fullgraph=True, dynamic=True, backend=counter)
    for batch, outputs in zip(batches, expected, strict=True):
        compiled = model(batch)
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(compiled[key], outputs[key], rtol=0, atol=1e-5)
        (compiled["pred_logits"].sum() + compiled["pred_boxes"].sum()).backward()
    assert counter.frame_count == 1
    torch.compiler.reset()
