"""The command line: `raydetr COMMAND --help` shows an example of each.

Exit code 0: done; 1: failed; 2: the input is wrong (one line on stderr says what, where and how to mend it); 3: the
work is done and uploads wait for the tracking server; 130 and 143: interrupted by SIGINT and SIGTERM, in order.
"""

import importlib.metadata
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.exceptions import TyperException

from jobs.export import export
from jobs.interrupt import Interrupted, RayLostError, end_in_order, received
from jobs.models import AsJson, TrackingUri, models
from jobs.models import ConfigFile as RegistryConfig
from jobs.options import ConfigFile, Overrides, Step
from jobs.remote import jobs_app, submit
from jobs.replay import replay
from jobs.sweep import sweep
from pipeline.config.address import without_secrets
from pipeline.errors import TrackingError, UserError
from pipeline.log import set_up_logging

if TYPE_CHECKING:
    from jobs.run import Pipeline
    from pipeline.config.sections import Config

app = typer.Typer(
    help="Train Deformable DETR on COCO-format data: shard, train, evaluate, register.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

track = typer.Typer(help="What waits for the tracking server.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(track, name="track")
app.command(epilog="Example: raydetr submit run -c my.yaml --address http://head:8265 --follow")(submit)
app.command(epilog="Example: raydetr sweep -c my.yaml --over train.lr=1e-4,2e-4 --over train.weight_decay=1e-4,1e-3")(
    sweep
)
app.command(epilog="Example: raydetr export --checkpoint models:/cells@champion --to torch --out c.pt2 --dynamic")(
    export
)
app.command(epilog="Example: raydetr replay 1234 -c my.yaml --out step")(replay)
app.add_typer(jobs_app, name="jobs")
app.add_typer(models, name="models")


@app.command(epilog="Example: raydetr run -c jobs/configs/demo.yaml --set train.epochs=2")
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    first: Annotated[Step, typer.Option("--from", help="The first step.")] = "shard",
    last: Annotated[Step, typer.Option("--until", help="The last step.")] = "register",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait where another command works on the run, instead of being refused.")
    ] = False,
) -> None:
    """Do the pipeline's steps: shard, train, evaluate, register. What is done already is not done again."""
    settings = _load(config, overrides)
    from jobs.run import run_pipeline

    run_pipeline(settings, first=first, last=last, wait=wait)


@app.command(epilog="Example: raydetr shard -c my.yaml --verify")
def shard(
    config: ConfigFile,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Decode every image fully.")] = False,
) -> None:
    """Write the dataset as WebDataset tars with a manifest."""
    with _pipeline(config, overrides, works_on_run=False) as pipeline:
        pipeline.shard(verify=verify)


@app.command(epilog="Example: raydetr train -c my.yaml --set cluster.workers=8")
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train on the shards, from the newest checkpoint of the run if there is one."""
    with _pipeline(config, overrides) as pipeline:
        pipeline.train()


@app.command(epilog="Example: raydetr evaluate --annotations val.json --detections detections.json --out scores")
def evaluate(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The pipeline's YAML file.")] = None,
    overrides: Overrides = None,
    annotations: Annotated[Path | None, typer.Option(help="Ground truth: a COCO JSON file (no config then).")] = None,
    detections: Annotated[Path | None, typer.Option(help="Detections: a file in COCO's result format.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights to score in place of the run's checkpoint: ours, published ones, ...")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results of a file.")] = None,
    iou_type: Annotated[
        Literal["bbox", "segm", "keypoints"], typer.Option(help="What overlaps, of a file of detections.")
    ] = "bbox",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Have pycocotools score the file of detections, too. A run: evaluate.verify."),
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Score each new checkpoint of a run that another command trains, until its last is scored. A run that "
            "has not begun, or that no command trains now, is waited for without a limit.",
        ),
    ] = False,
) -> None:
    """Score a run's last checkpoint on the validation split, a file of weights on it, or a file of detections."""
    if follow and (annotations or detections or weights or out or verify or iou_type != "bbox" or config is None):
        raise UserError("--follow is for the checkpoints of a run: give -c, and --set, with it and nothing else")
    if annotations or detections:
        if not (annotations and detections and out) or weights:
            raise UserError("scoring a file of detections takes --annotations, --detections and --out together")
        from pipeline.evaluate.report import metrics_table
        from pipeline.evaluate.results import evaluate_files

        typer.echo(metrics_table(evaluate_files(annotations, detections, out, iou_type, verify=verify)))
        return
    if verify or iou_type != "bbox":
        raise UserError("--verify and --iou-type are for a file of detections; the key for a run is evaluate.verify")
    if config is None:
        raise UserError("give a configuration with -c, or --annotations, --detections and --out")
    if (weights is None) != (out is None):
        raise UserError("scoring a file of weights takes -c, --weights and --out together")
    if follow:
        settings = _load(config, overrides)
        from jobs.follow import follow as follow_run

        follow_run(settings)
        return
    with _pipeline(config, overrides, works_on_run=weights is None) as pipeline:
        if weights and out:
            from pipeline.evaluate.report import metrics_table

            typer.echo(metrics_table(pipeline.evaluate_weights(weights, out)))
        else:
            pipeline.evaluate()


@app.command(epilog="Example: raydetr report --compare runs/cells runs/cells-larger --out comparison.html")
def report(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a run or of an evaluation.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The pipeline's YAML file, of a run.")] = None,
    overrides: Overrides = None,
    annotations: Annotated[Path | None, typer.Option(help="Ground truth of a file of detections.")] = None,
    detections: Annotated[Path | None, typer.Option(help="Detections: a file in COCO's result format.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder or archive of the images of --annotations.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Set B against A: each is a folder, or the YAML file of a run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page; else beside the evaluation, or report.html here.")] = None,
) -> None:
    """Write an HTML page about an evaluation, a file of detections, or two evaluations against each other."""
    if (annotations is None) != (detections is None) or (images and not annotations):
        raise UserError(
            "a report of a file of detections takes --annotations, --detections, and --images if they lie here"
        )
    if sum(given is not None for given in (folder, config, annotations, compare)) != 1:
        raise UserError("give one of: a folder, -c, --annotations and --detections, --compare")
    if overrides and config is None:
        raise UserError("--set changes a configuration: give one with -c")
    from jobs.report import report as report_folder
    from jobs.report import report_comparison, report_files, report_run

    page = out or Path("report.html")
    if compare is not None:
        report_comparison(*compare, page)
    elif annotations and detections:
        report_files(annotations, detections, images, page)
    elif config is not None:
        page = report_run(_load(config, overrides).folder, out)
    elif folder is not None:
        page = report_folder(folder, out)
    typer.echo(f"{page}: open it in a browser")


@app.command(epilog="Example: raydetr register -c my.yaml --set register.model_name=cells")
def register(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make the scored checkpoint a version of the registered model; @champion moves if it is better."""
    with _pipeline(config, overrides) as pipeline:
        pipeline.register()


@track.command("sync", epilog="Example: raydetr track sync -c my.yaml")
def track_sync(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait where another command works on the run.")] = False,
) -> None:
    """Upload what a run has for the tracking server and could not upload; exit code 3 if it cannot now either."""
    settings = _load(config, overrides)
    from jobs.track import sync

    sync(settings, wait=wait)


@app.command(epilog="Example: raydetr runs --tracking-uri http://mlflow:5000")
def runs(
    config: RegistryConfig = None,
    tracking_uri: TrackingUri = None,
    limit: Annotated[int, typer.Option(min=1, help="Most runs, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """The newest runs: status, AP, age, and whether a command works on those that say RUNNING."""
    from jobs.runs import show_runs

    show_runs(config, tracking_uri, limit, as_json=as_json)


@app.command(epilog="Example: raydetr predict -m models:/raydetr-demo@champion --out drawn picture.jpg")
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders, 'patterns*.jpg', COCO files; all but patterns also as s3:// or http://."
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the drawn pictures, images.json, detections.json.")],
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server of the registry; the default is runs/mlflow.db.")
    ] = None,
    images_in: Annotated[
        str | None, typer.Option(help="Folder, archive or address of a COCO file's pictures, if not its own folder.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most pictures at once; the default is 8 on a GPU and 1 on the CPU.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Where the network runs; a GPU if there is one."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write, a line a detection.")] = None,
    score_threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score that is drawn.")] = 0.4,
    show_attention: Annotated[
        bool,
        typer.Option(
            "--show-attention",
            help="Draw what the best detection looked at, too: the points that its query samples on each level, "
            "colored by their weights, as NAME_queryN.png.",
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="--show-attention: of how many detections, best first.")] = 1,
    query: Annotated[
        list[int] | None,
        typer.Option(min=0, help="--show-attention: of this query instead; may be repeated."),
    ] = None,
) -> None:
    """Draw a registered model's detections on pictures, and with --show-attention what it looked at."""
    if (query or top > 1) and not show_attention:
        raise UserError("--query and --top choose what --show-attention draws: give that, too")
    from jobs.predict import predict as predict_pictures
    from pipeline.config.sections import default_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri()
    drawn = predict_pictures(
        model,
        images,
        out,
        tracking_uri=uri,
        score_threshold=score_threshold,
        show_attention=top if show_attention else 0,
        queries=query or (),
        table=csv,
        root=images_in,
        batch_size=batch_size,
        device=device,
    )
    best = f", best {drawn.best:.2f}" if drawn.detections == 0 and drawn.best is not None else ""
    rate = f"{drawn.pictures / drawn.seconds:.3g} images/s"
    typer.echo(
        f"{drawn.pictures} pictures, {drawn.detections} detections at {score_threshold:g}{best}, in {out}, {rate}"
    )
    if drawn.unusable:
        sys.stderr.write(
            f"error: {len(drawn.unusable)} of {len(drawn.unusable) + drawn.pictures} pictures cannot be used\n"
        )
        raise typer.Exit(1)


@app.command(epilog="Example: raydetr synth data/shapes --train-images 1000 --val-images 250")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    train_images: Annotated[int, typer.Option(min=1, help="Images of the training split.")] = 1000,
    val_images: Annotated[int, typer.Option(min=1, help="Images of the validation split.")] = 250,
    image_size: Annotated[int, typer.Option(min=64, help="Side of the square images, in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
) -> None:
    """Draw a COCO-format dataset of shapes."""
    from pipeline.config.sections import SyntheticSection
    from pipeline.shard.synthetic import draw_dataset

    draw_dataset(
        out, SyntheticSection(train_images=train_images, val_images=val_images, image_size=image_size, seed=seed), "OUT"
    )
    typer.echo(f"{train_images} + {val_images} images in {out}")


@app.command("import", epilog="Example: raydetr import yolo cells-roboflow --out data/cells")
def import_(
    kind: Annotated[
        Literal["yolo", "voc", "cvat", "webdataset"],
        typer.Argument(metavar="yolo|voc|cvat|webdataset", help="The format."),
    ],
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset, with its images.")],
    out: Annotated[Path, typer.Option(help="Folder in COCO's format to write; nothing may be there.")],
    val_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Draw this part of the images for validation, where DIR has no such split."),
    ] = None,
    categories: Annotated[
        Path | None, typer.Option(help="JSON file with the list `categories`, for webdataset's tars without names.")
    ] = None,
) -> None:
    """Make a dataset of another format one that the pipeline reads.

    YOLO, Pascal VOC, CVAT for images 1.1, or tars of webdataset with an image and a COCO-like JSON member a sample.
    """
    from pipeline.shard.imported import import_dataset

    imported = import_dataset(kind, source, out, val_share, categories)
    typer.echo(f"{out}: {imported.categories} classes")
    for split, (images, objects) in imported.counts.items():
        typer.echo(f"{split}: {images} images, {objects} objects")
    typer.echo(f"\nA configuration for it:\n\n{imported.config}", nl=False)


@app.command(epilog="Example: raydetr convert r50_deformable_detr-checkpoint.pth detector --to hf")
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Weights of any format: a file, folder or checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, or for hf the folder.")],
    to: Annotated[Literal["raydetr", "original", "hf"], typer.Option(help="Whose format to write.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with the model, where IN does not tell it.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Convert weights between this project, the original (.pth) and transformers (a folder)."""
    if overrides and config is None:
        raise UserError("--set changes a configuration: give one with -c")
    settings = _load(config, overrides).model if config else None
    from jobs.convert import convert as convert_weights

    typer.echo(convert_weights(source, out, to, settings))


@app.command(epilog="Example: raydetr config -c my.yaml --set train.epochs=10")
def config(
    config: ConfigFile,
    overrides: Overrides = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Print what DeepSpeed gets, as JSON.")] = False,
) -> None:
    """Print the whole configuration with all defaults, as YAML."""
    settings = _load(config, overrides)
    if deepspeed:
        from pipeline.train.engine import engine_config

        typer.echo(json.dumps(engine_config(settings.train, settings.world_sizes[0]), indent=2))
        return
    import yaml

    from pipeline.config.load import dump_config

    typer.echo(yaml.safe_dump(dump_config(settings), sort_keys=False), nl=False)


@app.command(epilog="Example: raydetr inspect -c jobs/configs/coco_r50.yaml --set model.backbone=resnet101")
def inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes, where the data is not sharded yet.")] = None,
    data: Annotated[bool, typer.Option("--data", help="Look at the data: write an HTML page, with pictures.")] = False,
    out: Annotated[Path, typer.Option(help="The page that --data writes.")] = Path("data.html"),
) -> None:
    """Print the size of the network and the multiply-adds of one image, or look at the data before it is trained on."""
    settings = _load(config, overrides)
    from jobs.inspect import inspect_data, inspect_model

    if data:
        inspect_data(settings, out)
        typer.echo(f"{out}: open it in a browser")
        return
    for what, value in inspect_model(settings, classes).items():
        typer.echo(f"{what:<14} {value}")


@app.command(epilog="Example: raydetr plan -c jobs/configs/coco_r50.yaml --images 118287 --gpu H100 --price 2.5")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; else a table over 1, 8, 64, 256 GPUs.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a machine; 8 with --nodes alone.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The card: V100, A100, H100, H200, B200.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of an epoch, of COCO's sizes, where the data is not here.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes, where the data does not tell them.")] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s that a GPU sends; else the card's link, and 25 between machines."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of an hour of a GPU.")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Part of the card's most that is reached; --profile measures it.")
    ] = 0.3,
    profile: Annotated[Path | None, typer.Option(help="Times measured by --measure, in place of assumed ones.")] = None,
    measure: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Train a few steps here on random images, write their times, end."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what training will take before it starts: steps, FLOPs, memory, time, data, checkpoints and cost."""
    if measure and profile:
        raise UserError("--measure makes a profile and --profile reads one: give one of them")
    settings = _load(config, overrides)
    from jobs.plan import make_plan, show_plan
    from jobs.plan import measure as measure_here

    made = make_plan(
        settings, images=images, classes=classes, gpu=gpu, bandwidth=bandwidth, price=price, utilisation=utilisation,
        profile=profile,
    )  # fmt: skip
    if measure:
        measure_here(settings, made, measure)
        typer.echo(f"{measure}: now raydetr plan --profile {measure}")
        return
    show_plan(settings, made, nodes, gpus, as_json=as_json)


@app.command(epilog="Example: raydetr doctor --address 10.0.0.1:6379")
def doctor(
    address: Annotated[str | None, typer.Option(help="A Ray cluster, to look at each of its nodes.")] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="A pipeline that should run here.")] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is here, or on a cluster's nodes, and what is missing or wrong; exit code 1 if it must be mended."""
    from jobs.doctor import examine, examine_cluster, examine_config

    settings = _load(config, set_) if config else None
    findings = examine() + (examine_config(settings) if settings else [])
    if address := address or (settings.cluster.address if settings else None):
        findings += examine_cluster(address, settings)
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        typer.echo("\n".join(map(str, findings)))
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raydetr {importlib.metadata.version('raydetr')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what a server says.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options before the command."""
    set_up_logging(level=logging.DEBUG if debug else logging.INFO)


def _load(path: Path, overrides: list[str] | None) -> "Config":
    from pipeline.config.load import load_config

    return load_config(path, overrides or ())


def _pipeline(path: Path, overrides: list[str] | None, *, works_on_run: bool = True) -> "Pipeline":
    """The steps; a configuration is refused before what they need is imported, which takes seconds."""
    settings = _load(path, overrides)
    from jobs.run import Pipeline

    return Pipeline(settings, works_on_run=works_on_run)


def _end_now(last_line: str, exit_code: int) -> None:
    """End without what Ray's client does at an exit: it waits for its cluster, which is gone, and then aborts."""
    sys.stdout.flush()
    sys.stderr.write(f"{last_line}\n")
    sys.stderr.flush()
    os._exit(exit_code)


def _with_example(error: TyperException) -> str:
    """What is wrong with the words of a command, and how they are right."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    example = context.command.epilog if context is not None and context.command.epilog else "raydetr --help shows all"
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} {example}"


def _run() -> int | None:
    """What the command returns; what it raises once a signal has come is the interruption."""
    try:
        code: int | None = app(standalone_mode=False)
        return code
    except Exception:
        if interrupted := received():
            raise interrupted from None
        raise


def main() -> None:
    """Run the command line; errors that explain themselves become one line."""
    end_in_order()
    try:
        sys.exit(_run())
    except TyperException as error:
        sys.stderr.write(f"error: {_with_example(error)}\n" if error.format_message() else "")
        sys.exit(2)
    except Interrupted as interrupted:
        told = "".join(f"; {note}" for note in getattr(interrupted, "__notes__", ()))
        _end_now(
            f"interrupted ({interrupted}){told}. The same command goes on where this one stood.", interrupted.exit_code
        )
    except RayLostError as error:
        _end_now(f"error: {error}. The same command goes on where this one stood.", 1)
    except (UserError, TrackingError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, UserError):
            sys.stderr.write(f"error: {without_secrets(str(error))}\n")
            sys.exit(2)
        sys.stderr.write(f"{error}\n")
        sys.exit(3)
