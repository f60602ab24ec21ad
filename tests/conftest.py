"""Fixtures that every test may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.distributed import World, close, init_world
from pipeline.store import StorePath
from tests.ranks import Ranks, ranks_of
from tests.servers import POSTGRES, MlflowServer, Postgres
from tests.stores import S3Server

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers compute with one thread here; so does the process that is compared with them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the project; tests that need it are skipped where it is missing."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images (../shared/data) are not here")
    return folder


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all tests of a process: making one takes seconds."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One real server over HTTP for all tests, which leave it up."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """The same on PostgreSQL."""
    if POSTGRES is None:
        pytest.skip("needs PostgreSQL in /usr/lib/postgresql (Debian: postgresql)")
    postgres = Postgres()
    server = MlflowServer(tmp_path_factory.mktemp("postgres-server"), postgres=postgres)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        postgres.remove()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def outage_server(request: pytest.FixtureRequest) -> MlflowServer:
    """Each of the two, for tests that kill it."""
    name = "postgres_server" if request.param == "postgresql" else "mlflow_server"
    made: MlflowServer = request.getfixturevalue(name)
    return made


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One S3 server for all tests."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_folder(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> StorePath:
    """A folder in a bucket of its own, which this process and those that it starts can reach."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return StorePath(f"s3://{s3.bucket()}/folder")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as a world of its own; one for all tests, since DeepSpeed remembers the process group."""
    made = init_world("cpu")
    yield made
    close(made)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that train together."""
    with ranks_of(2, tmp_path_factory.mktemp("ranks") / "store") as two:
        yield two
