"""A cluster's Jobs API, over HTTP: Ray's client with time-outs, and with one line for whatever stands in the way."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipeline.config.address import without_secrets
from pipeline.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TIMEOUT_SECONDS = (5, 60)
"""To connect, and to get an answer."""
QUIET_SECONDS = 60
"""A connection that brought nothing of a log for so long may be dead, and is made anew."""
_AWAY = (502, 503, 504)


class LostError(UserError):
    """No head answers, for now."""


class TakenError(UserError):
    """There is a job of that id already."""


def address_of(given: str | None, environment: Mapping[str, str]) -> str:
    """The address to use: the given one, the environment's where that is one of the Jobs API, or this machine's head's.

    Raises:
        UserError: the given one is not http:// or https://.
    """
    named = [environment.get(name, "") for name in ADDRESS_VARIABLES]
    address = given or next((name for name in named if name.startswith(("http://", "https://"))), DEFAULT_ADDRESS)
    try:
        parts = urlsplit(address)
        is_right = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        raise UserError(f"--address {address}: must be the address of the Ray dashboard, such as http://head:8265")
    return address.rstrip("/")


class JobClient:
    """The jobs of one cluster.

    Args:
        address: of its dashboard, with the path of a proxy where it is behind one.

    Raises:
        LostError: nothing answers there.
        UserError: what answers is no Ray head, or refuses the token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for module in (dashboard_sdk, sdk):
            module.logger.setLevel(logging.WARNING)
        with self._told(), _without(ADDRESS_VARIABLES):
            self._client = _Client(address, verify=_authorities(os.environ))

    def submit(
        self, entry_point: str, job: str, package: str, variables: dict[str, str], about: dict[str, str]
    ) -> None:
        """Begin a job.

        Args:
            entry_point: the shell's line.
            job: its id.
            package: a zip file on this machine, in whose files the job runs.
            variables: of its environment.
            about: what is kept beside it, for people.

        Raises:
            TakenError: there is one of this id already.
        """
        environment = {"working_dir": package, "env_vars": variables}
        with self._told():
            try:
                self._client.submit_job(
                    entrypoint=entry_point, submission_id=job, runtime_env=environment, metadata=about
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise TakenError(f"there is a job {job} already") from None
                if "No available agent" in str(error):
                    raise LostError(f"{self.address}: the head has no agent for jobs yet; try again") from None
                raise

    def all(self) -> list[JobDetails]:
        """All that were submitted, the oldest first."""
        with self._told():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def info(self, job: str) -> JobDetails:
        """What is known of a job."""
        with self._told():
            return self._client.get_job_info(job)

    def stop(self, job: str) -> None:
        """Ask a job to end; it may take a while."""
        with self._told():
            self._client.stop_job(job)

    def log(self, job: str) -> str:
        """The log as far as it is."""
        with self._told():
            return str(self._client.get_job_logs(job))

    def tail(self, job: str) -> Iterator[str]:
        """The log from its beginning, as it comes, to the end of the job or of this connection."""
        with asyncio.Runner() as runner, self._told():
            stream = self._client.tail_job_logs(job)
            while (text := runner.run(self._next(stream))) is not None:
                yield text

    async def _next(self, stream: AsyncIterator[str]) -> str | None:
        """What the stream brings next; None at its end, and where it has brought nothing for long."""
        try:
            return await asyncio.wait_for(anext(stream, None), QUIET_SECONDS)
        except TimeoutError:
            return None
        except RuntimeError as error:  # Ray's, of a connection that was cut
            raise LostError(f"{self.address}: the connection to the cluster is lost ({_first_line(error)})") from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What is raised in the block becomes one line."""
        try:
            yield
        except UserError:
            raise
        except AuthenticationError as error:
            raise UserError(
                f"{self.address}: the cluster wants a token, and not the one given here; set RAY_AUTH_MODE=token and "
                f"RAY_AUTH_TOKEN_PATH to the file of the cluster's token ({_first_line(error)})"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise LostError(f"{self.address}: the connection to the cluster is lost ({_first_line(error)})") from error
        except (RuntimeError, ValueError, KeyError) as error:
            told = str(error).strip().splitlines() or [repr(error)]
            told_shortly = told[0] if len(told) == 1 else f"{told[0]} {told[-1]}"
            raise UserError(f"{self.address}: does not do as asked ({told_shortly[:400]})") from error


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which would wait for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        address = self._address
        mend = "start a head with `ray start --head`, or give the address of its dashboard with --address"
        try:
            response: requests.Response = super()._do_request(method, endpoint, timeout=TIMEOUT_SECONDS, **options)
        except requests.exceptions.SSLError as error:
            raise UserError(
                f"{address}: its certificate is not trusted ({_cause(error)}); name the file of its authority in "
                "REQUESTS_CA_BUNDLE"
            ) from error
        except requests.exceptions.RequestException as error:
            raise LostError(f"{address}: no Ray answers ({_cause(error)}); {mend}") from error
        if response.status_code in _AWAY:
            raise LostError(f"{address}: the head behind it does not answer ({response.status_code}); {mend}")
        if endpoint == "/api/version" and "ray_version" not in response.text:
            raise UserError(f"{address}: what answers there is no Ray head ({response.status_code}); {mend}")
        return response


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:200]


def _cause(error: BaseException) -> str:
    """What the innermost of an error's reasons says."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return without_secrets(" ".join(str(error).split()) or repr(error))[:200]


def _authorities(environment: Mapping[str, str]) -> str | bool:
    """The file of trusted certificates that requests and the log's connection shall both use."""
    return environment.get("REQUESTS_CA_BUNDLE") or environment.get("SSL_CERT_FILE") or True


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Without some variables in the environment: Ray takes the addresses there before the one that it is given."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
