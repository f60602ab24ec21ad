"""What a version says about itself; test_entry.py runs what it says."""

from pathlib import Path

from pipeline.config.sections import METRICS
from pipeline.predict.answers import MOST_PICTURES, THRESHOLD
from pipeline.registry.description import description_of

MOST = 5000
"""Characters of a description in MLflow's databases."""
README = Path(__file__).resolve().parents[3] / "README.md"
METADATA = {"metrics": dict.fromkeys(METRICS, 0.5) | {"AP": 0.52801}, "step": 1200, "val_digest": "0123456789abcdef"}


def test_what_it_names() -> None:
    text = description_of("cells", "m-1234", METADATA)
    assert text.startswith("Detector of the model cells, step 1200: AP 0.5280, AP50 0.5000 on the validation data 0123")
    for part in ("mlflow models serve -m models:/m-1234 ", f"at most {MOST_PICTURES} a", f"to 1; {THRESHOLD:g} unless"):
        assert part in text
    assert len(description_of("n" * 250, "m" * 50, METADATA)) < MOST


def test_the_readme_says_the_same() -> None:
    readme, text = README.read_text(encoding="utf-8"), description_of("cells", "m-1234", METADATA)
    lines = [line for line in text.splitlines() if line.startswith(("printf", "    curl", "| `score_threshold`"))]
    lines += [line for line in text.splitlines() if line.startswith('{"predictions"')]
    assert len(lines) == 4
    assert [line for line in lines if line not in readme] == []
