"""Names that MLflow takes: by its own rules, and none twice."""

import pytest

from pipeline.tracking.names import LENGTH, legal_names, metric_name

BAD = ["w/", "..", "a//b", ".", "/", "", "x" * 250, "../../x", "a:b", "né/ü", "a\nb", "w"]


@pytest.mark.parametrize("name", [*BAD, *(f"val_category/AP/{name}" for name in BAD)])
def test_mlflow_takes_the_name(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

    legal = metric_name(name)
    for check in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        check(legal)
    assert len(legal) <= LENGTH
    assert metric_name(legal) == legal


def test_no_name_is_given_twice() -> None:
    names = ["w/", "w/_", "a:b", "a_b", "a;b", "x" * 251, "x" * 252, "..", "__"]
    made = legal_names(names, {})
    assert len(set(made.values())) == len(names)
    assert made["a_b"] == "a_b", "a legal name keeps itself, whatever comes before it"
    later = legal_names(["a?b"], made)
    assert later["a?b"] not in made.values()
    assert not legal_names(names, made)
