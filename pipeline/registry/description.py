"""What a version says about itself on its page: what it is, what it takes and answers, how it is served and asked."""

from collections.abc import Mapping
from typing import Any

from pipeline.predict.answers import MOST_PICTURES, THRESHOLD

TEXT = """\
Detector of the model {name}, step {step}: AP {AP:.4f}, AP50 {AP50:.4f} on the validation data {val}.

```
mlflow models serve -m models:/{model_id} --env-manager local --port 5001
```

`MLFLOW_TRACKING_URI` is this registry; with `--env-manager virtualenv` it is served from its own requirements. Ask it:

```
printf '{{"dataframe_records": [{{"image": "%s"}}], "params": {{"score_threshold": {threshold:g}}}}}' \
"$(base64 -w0 picture.jpg)" |
    curl --data-binary @- -H 'Content-Type: application/json' http://127.0.0.1:5001/invocations
```

| | |
|---|---|
| `image` | a record a picture, at most {most} a request: a JPEG, PNG, WebP, BMP or TIFF file in base64, or RGB of \
8 bits as lists `[height, width, 3]`; for `mlflow.pyfunc.load_model` also bytes, arrays and `pathlib.Path` |
| `score_threshold` | least score of a detection, 0 to 1; {threshold:g} unless it is given |

The answer, a record a picture; boxes are left, top, width and height in pixels, best scores first:

```
{{"predictions": [{{"detections": [{{"category_id": 3, "category": "car", "score": 0.91, \
"bbox": [12.0, 8.5, 96.0, 40.0]}}], "error": null}}]}}
```

A picture that cannot be used has no detections, and its `error` says why. A request that is wrong (no picture, \
another column or parameter) is answered with status 400.
"""


def description_of(name: str, model_id: str, metadata: Mapping[str, Any]) -> str:
    """The description of a version, in Markdown.

    Args:
        name: the registered model.
        model_id: of the logged model that the version is of.
        metadata: what the version says about itself.
    """
    metrics = metadata["metrics"]
    return TEXT.format(
        name=name,
        model_id=model_id,
        step=metadata["step"],
        AP=metrics["AP"],
        AP50=metrics["AP50"],
        val=metadata["val_digest"][:12],
        threshold=THRESHOLD,
        most=MOST_PICTURES,
    )
