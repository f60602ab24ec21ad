"""The team's registry: what it holds, and which version is the champion."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.console import print_table

if TYPE_CHECKING:
    from pipeline.registry.aliases import Standing

models = typer.Typer(
    help="The registered models: what there is, and which version is the champion.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A pipeline's YAML file, whose tracking.uri has the registry.")
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow server of the registry; the default is that of -c, or runs/mlflow.db.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str, typer.Option(help="Why; kept with who and when.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="NAME@ALIAS or NAME/NUMBER, such as cells/7.")]
Name = Annotated[str, typer.Argument(help="The registered model.")]


def registry_uri(config: Path | None, tracking_uri: str | None) -> str:
    """The registry that a command means."""
    from pipeline.config.load import load_config
    from pipeline.config.sections import default_tracking_uri

    if tracking_uri is not None:
        return tracking_uri
    if config is not None:
        return load_config(config, ()).tracking_uri
    return os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri()


@contextmanager
def _registry(config: Path | None, tracking_uri: str | None) -> Iterator[Any]:
    from pipeline.registry.versions import open_registry

    with open_registry(registry_uri(config, tracking_uri)) as client:
        yield client


@models.command("list", epilog="Example: raydetr models list --tracking-uri http://mlflow:5000")
def list_(config: ConfigFile = None, tracking_uri: TrackingUri = None, as_json: AsJson = False) -> None:
    """All registered models, with their champions."""
    from pipeline.registry.catalogue import list_models

    with _registry(config, tracking_uri) as client:
        found = list_models(client)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    keys = ["name", "champion", "AP", "challenger", "previous", "pinned", "changed"]
    rows = [[model.get(key) if key != "pinned" else _yes(model[key]) for key in keys] for model in found]
    print_table(keys, rows)


def _yes(value: bool) -> str:
    return "yes" if value else ""


@models.command(epilog="Example: raydetr models show cells")
def show(name: Name, config: ConfigFile = None, tracking_uri: TrackingUri = None, as_json: AsJson = False) -> None:
    """The versions of a registered model, and who moved its champion, when and why."""
    from pipeline.registry.catalogue import show_model
    from pipeline.registry.gate import pin_told

    with _registry(config, tracking_uri) as client:
        model = show_model(client, name)
    if as_json:
        typer.echo(json.dumps(model, indent=1))
        return
    if model["pin"]:
        typer.echo(f"@champion stays version {model['champion']}: {pin_told(model['pin'])}\n")
    rows = [
        [
            version["version"],
            " ".join(f"@{alias}" for alias in version["aliases"]),
            *(version["metrics"].get(metric) for metric in ("AP", "AP50")),
            version["step"],
            version["val_digest"][:8] if version["val_digest"] else None,
            version["parent"].removeprefix("models:/") if version["parent"] else None,
            _code(version["code"]),
            version["created"],
            version["note"],
        ]
        for version in model["versions"]
    ]
    print_table(["version", "aliases", "AP", "AP50", "step", "val split", "parent", "code", "created", "note"], rows)
    rows = [
        [change["when"], change["action"], change["aliases"].get("champion"), change["who"], change["why"]]
        for change in model["changes"]
    ]
    typer.echo()
    print_table(["when (UTC)", "change", "champion", "who", "why"], rows)


def _code(code: dict[str, str | None]) -> str:
    commit = f" {code['git_commit'][:8]}" if code["git_commit"] else ""
    return f"{code['version'] or '-'}{commit}{' dirty' if code['git_dirty'] == 'true' else ''}"


@models.command(epilog="Example: raydetr models compare cells@champion cells@challenger")
def compare(
    first: Version,
    second: Version,
    config: ConfigFile = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Two versions beside each other: the twelve numbers, and AP by category."""
    from pipeline.registry.catalogue import compare as compare_versions
    from pipeline.registry.versions import resolve

    with _registry(config, tracking_uri) as client:
        found = compare_versions(resolve(client, first), resolve(client, second))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    if not found["same_validation_split"]:
        typer.echo("They were scored on different validation splits: the numbers cannot be compared.\n")
    columns = [f"{found[side]['name']}/{found[side]['version']}" for side in ("first", "second")]
    for title, key in (("metric", "metrics"), ("AP of category", "category_AP")):
        rows = [
            [name, *(None if values[side] == -1 else values[side] for side in ("first", "second")),
             None if values["difference"] is None else f"{values['difference']:+.4f}"]
            for name, values in found[key].items()
        ]  # fmt: skip
        print_table([title, *columns, "difference"], rows)
        typer.echo()


@models.command(epilog="Example: raydetr models promote cells/7 --reason 'fewer misses on the new camera'")
def promote(version: Version, reason: Reason = "", config: ConfigFile = None, tracking_uri: TrackingUri = None) -> None:
    """Make a version the champion, and pin it: no registration moves it until `unpin`."""
    from pipeline.registry import aliases
    from pipeline.registry.versions import resolve

    with _registry(config, tracking_uri) as client:
        found = resolve(client, version)
        _tell(found.name, aliases.promote(client, found.name, str(found.version), reason))


@models.command(epilog="Example: raydetr models rollback cells --reason 'misses small cells'")
def rollback(name: Name, reason: Reason = "", config: ConfigFile = None, tracking_uri: TrackingUri = None) -> None:
    """Make the champion before this one the champion again, and pin it. A second time takes that back."""
    from pipeline.registry import aliases

    _change(aliases.roll_back, name, reason, config, tracking_uri)


@models.command(epilog="Example: raydetr models pin cells --reason 'until the audit is over'")
def pin(name: Name, reason: Reason = "", config: ConfigFile = None, tracking_uri: TrackingUri = None) -> None:
    """Keep the champion, whatever is registered; new versions become @challenger."""
    from pipeline.registry import aliases

    _change(aliases.pin, name, reason, config, tracking_uri)


@models.command(epilog="Example: raydetr models unpin cells")
def unpin(name: Name, reason: Reason = "", config: ConfigFile = None, tracking_uri: TrackingUri = None) -> None:
    """Let the next better version become the champion again."""
    from pipeline.registry import aliases

    _change(aliases.unpin, name, reason, config, tracking_uri)


def _change(change: Any, name: str, reason: str, config: Path | None, tracking_uri: str | None) -> None:
    from pipeline.registry.versions import find_model

    with _registry(config, tracking_uri) as client:
        find_model(client, name)
        _tell(name, change(client, name, reason))


def _tell(name: str, standing: "Standing") -> None:
    now = ", ".join(f"@{alias} version {version}" for alias, version in standing.aliases.items())
    typer.echo(f"{name}: {now}{'; pinned' if standing.pin else ''}")


@models.command(epilog="Example: raydetr models download cells@champion --out cells-champion")
def download(
    version: Version,
    out: Annotated[Path, typer.Option(help="Folder to write, which `raydetr predict -m` takes; nothing may be there.")],
    config: ConfigFile = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write the files of a version into a folder."""
    from pipeline.registry.versions import download as download_version
    from pipeline.registry.versions import resolve

    with _registry(config, tracking_uri) as client:
        found = resolve(client, version)
        download_version(client, found, registry_uri(config, tracking_uri), out)
    typer.echo(f"{found.name} version {found.version} in {out}")
