"""Ray Train's workers: which processes stand beside them. What the workers do is tests/jobs/test_train.py's."""

from typing import Any

import pytest
import ray

from jobs.cluster import connected
from jobs.worker_group import ProcessGroup, Trainer
from pipeline.config.sections import ClusterSection


def callbacks() -> set[str]:
    """What Ray Train's controller would call of a trainer that is made here."""
    trainer = Trainer(lambda: None, backend_config=ProcessGroup(backend="gloo", timeout_s=60))
    return {type(each).__name__ for each in trainer._create_default_callbacks()}


def test_what_frees_the_resources_of_a_trial_is_there_for_a_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connected(ClusterSection(workers=1, device="cpu")):
        trial: Any = ray.remote(num_cpus=0)(type("Trial", (), {"callbacks": lambda self: callbacks()}))
        of_trial = ray.get(trial.remote().callbacks.remote())
        of_driver = callbacks()
    assert "BackendSetupCallback" in of_driver
    assert of_trial - of_driver == {"PlacementGroupCleanerCallback"}
    assert "DatasetsCallback" not in of_trial
