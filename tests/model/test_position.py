import math

import torch

from model.position import encode_boxes, encode_cells


def sine(angle: float, index: int, channels: int) -> float:
    phase = angle / 10000 ** (2 * (index // 2) / channels)
    return math.sin(phase) if index % 2 == 0 else math.cos(phase)


def test_cells_by_hand() -> None:
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, 3:] = True
    mask[:, :, 4:] = True
    code = encode_cells(mask, 16, torch.float64).view(4, 5, 16)
    row, column = 2, 1
    y, x = (row + 0.5) / (3 + 1e-6) * 2 * math.pi, (column + 0.5) / (4 + 1e-6) * 2 * math.pi
    expected = [sine(y, i, 8) for i in range(8)] + [sine(x, i, 8) for i in range(8)]  # y before x
    torch.testing.assert_close(code[row, column], torch.tensor(expected, dtype=torch.float64))


def test_detrs_cells_by_hand() -> None:
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, 3:] = True
    code = encode_cells(mask, 8, torch.float64, from_centres=False).view(4, 5, 8)[2, 1]
    y, x = 3 / (3 + 1e-6) * 2 * math.pi, 2 / (5 + 1e-6) * 2 * math.pi  # its last valid row, its second column
    expected = [sine(y, i, 4) for i in range(4)] + [sine(x, i, 4) for i in range(4)]
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64))


def test_code_depends_on_the_valid_part_alone() -> None:
    padded = torch.ones(1, 6, 9, dtype=torch.bool)
    padded[:, :4, :5] = False
    inside = encode_cells(padded, 32).view(6, 9, 32)[:4, :5]
    torch.testing.assert_close(inside.flatten(0, 1), encode_cells(torch.zeros(1, 4, 5, dtype=torch.bool), 32)[0])


def test_all_padding_is_finite() -> None:
    assert torch.isfinite(encode_cells(torch.ones(1, 3, 3, dtype=torch.bool), 16)).all()


def test_boxes_by_hand() -> None:
    box = [0.1, 0.2, 0.3, 1.0]
    code = encode_boxes(torch.tensor([box], dtype=torch.float64), 8)
    expected = [sine(value * 2 * math.pi, i, 8) for value in box for i in range(8)]
    torch.testing.assert_close(code[0], torch.tensor(expected, dtype=torch.float64))
