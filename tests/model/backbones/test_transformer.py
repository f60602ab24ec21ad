import torch

from model.backbones.transformer import from_windows, padded, round_up, to_windows


def test_round_up() -> None:
    assert [round_up(side, 7) for side in (1, 7, 8)] == [7, 7, 14]


def test_windows_there_and_back() -> None:
    x = torch.arange(2 * 5 * 6 * 3.0).view(2, 5, 6, 3)
    whole = padded(x, 4)
    assert whole.shape == (2, 8, 8, 3)
    assert torch.equal(whole[:, :5, :6], x)
    assert not whole[:, 5:].any()
    assert not whole[:, :, 6:].any()
    windows = to_windows(whole, 4)
    assert windows.shape == (2, 2, 2, 16, 3)
    assert torch.equal(windows[1, 0, 1].view(4, 4, 3), whole[1, :4, 4:])
    assert torch.equal(from_windows(windows, 4), whole)
