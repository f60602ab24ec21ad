"""All initialisation of weights.

Of both detectors:

| what                                           | weight                         | bias                       |
|------------------------------------------------|--------------------------------|----------------------------|
| convolutions of a ResNet                       | Kaiming normal, fan out, ReLU  | none                       |
| a Swin's and a ViT's linear layers             | N(0, 0.02)                     | 0                          |
| ... their tables of biases, pos_embed          | N(0, 0.02)                     |                            |
| ... their convolutions                         | U(+-1 / sqrt(inputs))          | U(+-1 / sqrt(inputs))      |
| a ViT's scales of branches, ls1 and ls2        | 1                              |                            |
| frozen batch norm                              | 1 (mean 0, variance 1)         | 0                          |
| group norm, layer norm                         | 1                              | 0                          |
| query_embed, one_to_many_embed                 | N(0, 1)                        |                            |
| level_embed, label_embed                       | N(0, 1)                        |                            |
| self_attn, multihead_attn: in_proj, out_proj   | Xavier uniform                 | 0                          |
| linear1, linear2                               | Xavier uniform                 | U(+-1 / sqrt(inputs))      |
| class_embed, focal                             | U(+-1 / sqrt(inputs))          | -log(99)                   |

Of Deformable DETR:

| what                                           | weight                         | bias                       |
|------------------------------------------------|--------------------------------|----------------------------|
| input_proj convolutions                        | Xavier uniform                 | 0                          |
| attention: value_proj, output_proj             | Xavier uniform                 | 0                          |
| attention: attention_weights                   | 0                              | 0                          |
| attention: sampling_offsets                    | 0                              | see `offset_directions`    |
| enc_output, pos_trans                          | Xavier uniform                 | U(+-1 / sqrt(inputs))      |
| reference_points                               | Xavier uniform                 | 0                          |
| class_embed, softmax                           | U(+-1 / sqrt(inputs))          | 0                          |
| bbox_embed, first two layers                   | U(+-1 / sqrt(inputs))          | U(+-1 / sqrt(inputs))      |
| bbox_embed, last layer                         | 0                              | 0, 0, -2, -2               |
| ... with refinement, heads after the first     | as the first head              | 0, 0, 0, 0                 |
| ... with two stages, all heads                 | as the first head              | 0, 0, 0, 0                 |

Of DETR:

| what                                           | weight                         | bias                       |
|------------------------------------------------|--------------------------------|----------------------------|
| input_proj, bbox_embed, all layers             | U(+-1 / sqrt(inputs))          | U(+-1 / sqrt(inputs))      |
| class_embed, softmax                           | U(+-1 / sqrt(inputs))          | U(+-1 / sqrt(inputs))      |

Offsets and attention start out the same for every query, so that all of them look around evenly; -log(99) starts
every class at a probability of 0.01, since nearly all of them are absent; the size bias of -2 starts boxes at 0.12
of the image where no reference gives a size.
"""

import math

import torch
from torch import Tensor, nn

from model.backbones.backbone import Backbone
from model.backbones.resnet import ResNet
from model.backbones.swin import WindowAttention
from model.backbones.vit import LayerScale, ViT
from model.deformable_attention import MSDeformAttn
from model.deformable_detr import DeformableDetr
from model.detr import Detr
from model.heads import BoxHead
from model.losses.class_loss import make_class_loss


def init_weights(model: DeformableDetr | Detr, generator: torch.Generator | None = None) -> None:
    """Draw all initial weights by the table above; published ones may be loaded over them.

    Args:
        model: the detector.
        generator: source of the draws, on the CPU; torch's global one when None.
    """
    with torch.no_grad():
        if isinstance(model.backbone, ResNet):
            for module in model.backbone.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            _init_vision_transformer(model.backbone, generator)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()
        if isinstance(model, Detr):
            _init_detr(model, generator)
        else:
            _init_deformable_detr(model, generator)


def _init_vision_transformer(backbone: Backbone, generator: torch.Generator | None) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            _init_uniform_layer(module, generator)
        elif isinstance(module, ViT):
            nn.init.trunc_normal_(module.pos_embed, std=0.02, generator=generator)
        elif isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02, generator=generator)


def _init_detr(model: Detr, generator: torch.Generator | None) -> None:
    _init_uniform_layer(model.input_proj, generator)
    model.query_embed.weight.normal_(generator=generator)
    _init_transformer(model.transformer, generator)
    _init_heads_of_detr(model, generator)


def _init_deformable_detr(model: DeformableDetr, generator: torch.Generator | None) -> None:
    for module in model.input_proj.modules():
        if isinstance(module, nn.Conv2d):
            _init_xavier(module, generator)
    if model.config.query_width:
        model.query_embed.weight.normal_(generator=generator)
    _init_transformer(model.transformer, generator)
    model.transformer.level_embed.normal_(generator=generator)
    _init_heads(model, generator)
    # Last, so that all else begins as without it.
    if model.config.query_width and model.config.one_to_many:
        model.one_to_many_embed.weight.normal_(generator=generator)
    if model.config.denoising:
        model.transformer.label_embed.weight.normal_(generator=generator)


_UNIFORM_BIAS = ("linear1", "linear2", "enc_output", "pos_trans")


def _init_transformer(transformer: nn.Module, generator: torch.Generator | None) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, MSDeformAttn):
            _init_xavier(module.value_proj, generator)
            _init_xavier(module.output_proj, generator)
            nn.init.zeros_(module.attention_weights.weight)
            nn.init.zeros_(module.attention_weights.bias)
            nn.init.zeros_(module.sampling_offsets.weight)
            module.sampling_offsets.bias.copy_(offset_directions(module.heads, module.levels, module.points).flatten())
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
            nn.init.zeros_(module.in_proj_bias)
            _init_xavier(module.out_proj, generator)
        elif isinstance(module, nn.Linear) and name.split(".")[-1] in _UNIFORM_BIAS:
            _init_xavier(module, generator)
            _init_uniform(module.bias, module.in_features, generator)
        elif isinstance(module, nn.Linear) and name == "reference_points":
            _init_xavier(module, generator)


def _init_heads(model: DeformableDetr, generator: torch.Generator | None) -> None:
    class_head, box_head = model.class_embed[0], model.bbox_embed[0]
    assert isinstance(class_head, nn.Linear)
    assert isinstance(box_head, BoxHead)
    _init_uniform(class_head.weight, class_head.in_features, generator)
    nn.init.constant_(class_head.bias, make_class_loss(model.config.class_loss).bias or 0.0)
    *hidden, last = (layer for layer in box_head.layers if isinstance(layer, nn.Linear))
    for layer in hidden:
        _init_uniform_layer(layer, generator)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if model.config.with_box_refine:
        for head in model.class_embed[1:]:
            head.load_state_dict(class_head.state_dict())
        for head in model.bbox_embed[1:]:
            head.load_state_dict(box_head.state_dict())
    if not model.config.two_stage:
        last.bias[2:] = -2.0


def _init_heads_of_detr(model: Detr, generator: torch.Generator | None) -> None:
    _init_uniform_layer(model.class_embed, generator)
    bias = make_class_loss(model.config.class_loss).bias
    if bias is not None:
        nn.init.constant_(model.class_embed.bias, bias)
    for layer in model.bbox_embed.layers:
        assert isinstance(layer, nn.Linear)
        _init_uniform_layer(layer, generator)


def _init_xavier(module: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    nn.init.xavier_uniform_(module.weight, generator=generator)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _init_uniform_layer(module: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator | None) -> None:
    """As torch does by default."""
    inputs = module.weight[0].numel()
    _init_uniform(module.weight, inputs, generator)
    if module.bias is not None:
        _init_uniform(module.bias, inputs, generator)


def _init_uniform(tensor: Tensor, inputs: int, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(tensor, -bound, bound, generator=generator)


def offset_directions(heads: int, levels: int, points: int) -> Tensor:
    """Initial offsets `[heads, levels, points, 2]` (x, y) in cells: head k looks into the direction 2 pi k / heads, its
    point p at a distance of p + 1 along the larger axis, alike on all levels (appendix A.4).
    """
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions /= directions.abs().amax(-1, keepdim=True)
    distances = torch.arange(1, points + 1, dtype=torch.float32)
    return (directions[:, None, None] * distances[:, None]).expand(heads, levels, points, 2)
