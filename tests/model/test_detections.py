import pytest
import torch

from model.detections import postprocess


def test_top_pairs_of_query_and_class_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0, 1.5], [-3.0, 3.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.4, 0.4]]])
    found = postprocess(logits, boxes, torch.tensor([[100, 200]]), "focal", top=3)[0]
    assert found["labels"].tolist() == [1, 0, 2]
    assert found["queries"].tolist() == [1, 0, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 1.5]).sigmoid())
    expected = torch.tensor([[140.0, -10, 220, 30], [50, 25, 150, 75], [50, 25, 150, 75]])  # not clipped
    torch.testing.assert_close(found["boxes"], expected)


def test_softmax_gives_each_query_its_best_class() -> None:
    logits = torch.tensor([[[2.0, 1.9, 0.0], [0.0, 1.0, 5.0]]])
    found = postprocess(logits, torch.rand(1, 2, 4), torch.tensor([[10, 10]]), "softmax")[0]
    assert found["labels"].tolist() == [0, 1]
    assert found["queries"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], logits.softmax(-1)[0, [0, 1], [0, 1]])


@pytest.mark.parametrize("class_loss", ["focal", "vfl", "ia_bce", "ma", "softmax"])
def test_never_more_than_there_are(class_loss: str) -> None:
    found = postprocess(torch.randn(2, 3, 4), torch.rand(2, 3, 4), torch.tensor([[5, 6], [7, 8]]), class_loss)
    assert [len(image["scores"]) for image in found] == ([3, 3] if class_loss == "softmax" else [12, 12])
    for image in found:
        assert (image["scores"].diff() <= 0).all()
        assert image["boxes"].shape == (len(image["scores"]), 4)


def test_each_image_has_its_own_size() -> None:
    logits, boxes = torch.zeros(2, 1, 1), torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(2, 1, 4)
    found = postprocess(logits, boxes, torch.tensor([[480, 640], [1, 2]]), "focal")
    assert [image["boxes"][0].tolist() for image in found] == [[0, 0, 640, 480], [0, 0, 2, 1]]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must be focal, vfl, ia_bce, ma or softmax"):
        postprocess(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(1, 2), "sigmoid")
    with pytest.raises(ValueError, match="expected \\(1, 2\\)"):
        postprocess(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(2), "focal")
