"""jobs/cluster.py: which Ray is used, and what is said when it does not fit."""

from pathlib import Path

import pytest
import ray

from jobs.cluster import check_alive, connected, device_of
from jobs.interrupt import RayLostError
from jobs.tasks import run_tasks
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


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_an_address_where_nothing_listens(address: str) -> None:
    with (
        pytest.raises(UserError, match=r"cluster\.address .*no Ray answers.*ray start --head"),
        connected(ClusterSection(address=address)),
    ):
        pass


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "head:", ":6379"])
@pytest.mark.parametrize("key", ["cluster.address", "RAY_ADDRESS"])
def test_what_is_no_address_is_told_by_its_key(address: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    section = ClusterSection(address=address if key == "cluster.address" else None)
    with pytest.raises(UserError, match=rf"^{key} .*must be host:port"), connected(section):
        pass


def test_more_workers_than_this_machine_has_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    with (
        pytest.raises(UserError, match=r"cluster\.workers 999 .* need 999 CPUs and this machine has \d+; lower one"),
        connected(ClusterSection(workers=999)),
    ):
        pass
    assert not ray.is_initialized()


def test_ray_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", raise_value_error)
    with (
        pytest.raises(
            UserError,
            match=r"Ray cannot be started on this machine \(AF_UNIX path length cannot exceed 107 bytes\).*RAY_TMPDIR",
        ),
        connected(ClusterSection()),
    ):
        pass


def raise_value_error(**_: object) -> None:
    raise ValueError("AF_UNIX path length\ncannot exceed 107 bytes")


def test_workers_use_our_packages_wherever_the_command_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("model", "pipeline", "jobs"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the user has modules of the same names')")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    with connected(ClusterSection()):
        check_alive()
        assert dict(run_tasks(resized, [(10, 20)], at_once=1)) == {(10, 20): resized((10, 20))}


def resized(size: tuple[int, int]) -> tuple[int, int]:
    from pipeline.data.augment import plan_eval

    return plan_eval(*size, 5, 100).size


class Lost:
    """Ray without its head, as the driver sees it: nothing listens where it was."""

    gcs_address = "127.0.0.1:1"


def test_a_lost_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_runtime_context", Lost)
    with pytest.raises(RayLostError, match=r"Ray has ended: its head at 127\.0\.0\.1:1 does not answer"):
        check_alive(lost_seconds=0.5)
