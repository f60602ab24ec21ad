"""A registered detector, loaded with MLflow where it will be loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.predict.detector import Detector
from pipeline.registry.register import Registration
from pipeline.tracking.tracker import Tracker
from tests.builders import write_image
from tests.pipeline.registry.registered import SECTION

LOAD = """
import json, sys
from pathlib import Path
import model, pipeline
import mlflow, pandas
mine = model
mlflow.set_tracking_uri(sys.argv[1])
picture = pandas.DataFrame({"image": [Path(sys.argv[3]).read_bytes()] * 2})
answers = []
for _ in range(2):
    loaded = mlflow.pyfunc.load_model(sys.argv[2])
    answers.append(loaded.predict(picture, params={"score_threshold": 0.001}))
    assert loaded.predict(picture, params={"score_threshold": 1.0}) == ["[]", "[]"]
assert answers[0] == answers[1]
assert sys.modules["model"] is mine
from model import MINE
assert (MINE, pipeline.MINE) == ("the user's", "the user's")
assert not {"ray", "deepspeed", "webdataset", "pycocotools"} & set(sys.modules)
print(json.dumps(answers[0]))
"""


def test_loads_beside_a_users_own_modules(
    tracker: Tracker, version: Registration, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("model.py", "pipeline.py"):
        (tmp_path / name).write_text('MINE = "the user\'s"\n')
    (tmp_path / "load.py").write_text(LOAD)
    picture = write_image(tmp_path / "picture.png", 50, 40)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # as here: more add up in another order
    result = subprocess.run(
        [sys.executable, "load.py", tracker.uri, "models:/shown@champion", picture.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = Detector.from_checkpoint(checkpoint, SECTION)(picture.read_bytes(), 0.001)
    assert [json.loads(text) for text in json.loads(result.stdout)] == [expected, expected]
    assert len(expected) == 5
