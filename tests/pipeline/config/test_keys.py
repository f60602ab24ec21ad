"""Messages that name settings by their whole keys."""

from pipeline.config.keys import with_keys


def test_settings_in_a_message_go_by_their_keys() -> None:
    said = "/data/heads: 91 class heads; set heads: 4, points: 8 and reset_heads: true, or model.arch: detr"
    assert with_keys(said, "model", "train.init") == (
        "/data/heads: 91 class heads; set model.heads: 4, model.points: 8 and train.init.reset_heads: true, "
        "or model.arch: detr"
    )
