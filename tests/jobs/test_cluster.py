"""jobs/cluster.py: which Ray is used, and what is said when it does not fit."""

import pytest
import ray

from jobs.cluster import connected, device_of
from pipeline.config.sections import ClusterSection
from pipeline.errors import UserError


def test_ray_is_started_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connected(ClusterSection(workers=2)):
        assert ray.cluster_resources()["CPU"] >= 2
        assert device_of(ClusterSection(device="auto")) == "cpu" or ray.cluster_resources().get("GPU")
        with connected(ClusterSection()):
            assert ray.is_initialized()
        assert ray.is_initialized()
        with pytest.raises(UserError, match=r"cluster.device cuda with 99 workers"):
            _with_many_gpus()
    assert not ray.is_initialized()


def _with_many_gpus() -> None:
    from jobs.cluster import _check_size

    _check_size(ClusterSection(workers=99, cpus_per_worker=0.01, device="cuda"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_address_where_nothing_listens(address: str) -> None:
    with (
        pytest.raises(UserError, match=r"cluster\.address .*no Ray answers.*ray start --head"),
        connected(ClusterSection(address=address)),
    ):
        pass
