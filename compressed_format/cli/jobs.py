"""``compress`` and ``decompress``: jobs that can be stopped, and go on when the same command is given again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from compressed_format.cli.exit_codes import ExitCode
from compressed_format.cli.messages import Failure, printable
from compressed_format.cli.options import consumer_names, debug_option, existing_path, for_option
from compressed_format.cli.progress import duration, progress_on, size
from compressed_format.errors import CheckpointExistsError, CompressedFormatError

__all__ = ["compress_command", "decompress_command"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SOURCE_HELP = "SRC is a folder with safetensors files, or one such file; DST is written whole or not at all."
_RESUME_HELP = "A job that was stopped or killed leaves DST.partial, and the same command goes on from there."


def _shard_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    from compressed_format.checkpoint.shards import parse_shard_size

    try:
        return parse_shard_size(value)
    except CompressedFormatError as error:
        raise click.BadParameter(str(error)) from error


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        import torch

        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
            raise click.BadParameter(f"{value!r} cannot be used: {str(error).splitlines()[0]}") from error
    return value


def _complete_config(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a shell offers for ``--config``: presets that begin so, else its own files; bash cannot mix both."""
    from compressed_format.config import PRESETS

    presets = [CompletionItem(name) for name in PRESETS if incomplete and name.startswith(incomplete.upper())]
    return presets or [CompletionItem(incomplete, type="file")]


def _job_options(command: _Function) -> _Function:
    """Arguments and options of both jobs."""
    options = [
        click.argument("source", metavar="SRC", type=existing_path),
        click.argument("destination", metavar="DST", type=click.Path(path_type=Path)),
        click.option("--workers", type=click.IntRange(min=1), help="Units of work at a time; the CPUs, by default."),
        click.option(
            "--device",
            metavar="DEVICE",
            callback=_device,
            help="Where to compute, such as cuda:0; the CPU, by default.",
        ),
        click.option(
            "--max-shard-size",
            metavar="SIZE",
            default="5GB",
            show_default=True,
            callback=_shard_size,
            help="Largest size of a file, such as 500MB.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace DST, in one step at the end, if it is there."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors."),
        debug_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    "compress",
    help=f"""Compress the checkpoint SRC by a config into DST.

    {_SOURCE_HELP} {_RESUME_HELP} Everything that can be known beforehand is checked before the job begins.
    """,
    epilog="""\b
Examples:
  compressed-format compress my-model my-model-w4a16 --config w4a16.json
  compressed-format compress my-model my-model-fp8 --config FP8_DYNAMIC --ignore lm_head
  compressed-format compress my-model out --config w4a16.json --for vllm --workers 2
  compressed-format compress model.safetensors packed.safetensors --config W8A16 --ignore lm_head""",
)
@click.option(
    "--config",
    required=True,
    metavar="FILE|PRESET",
    shell_complete=_complete_config,
    help="The config: a JSON file, or the name of a preset (compressed-format presets).",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="MODULE",
    help="Leave this module as it is; a name or re:REGEX, added to the config's own. May be given several times.",
)
@for_option(
    "Refuse the job if this consumer could not serve the result. May be given several times. Without it, a warning "
    "names those that could not."
)
@_job_options
def compress_command(
    source: Path,
    destination: Path,
    config: str,
    ignore: tuple[str, ...],
    consumers: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> None:
    settings = _read_config(config)
    if ignore:
        settings = settings.replace(ignore=(*settings.ignore, *ignore))
    from compressed_format.streaming import compress_checkpoint

    with _job(source, destination, "compressed", quiet=quiet) as progress:
        wanted = consumer_names(consumers) if consumers else None
        compress_checkpoint(source, destination, settings, progress=progress, consumers=wanted, **options)


@click.command(
    "decompress",
    help=f"""Write the compressed checkpoint SRC as the dense checkpoint DST.

    {_SOURCE_HELP} {_RESUME_HELP}
    """,
    epilog="""\b
Examples:
  compressed-format decompress my-model-w4a16 my-model-dense
  compressed-format decompress my-model-w4a16 my-model-float32 --dtype float32""",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of the weights; by default, that of the tensors that are not compressed.",
)
@_job_options
def decompress_command(source: Path, destination: Path, dtype: str | None, quiet: bool, **options: Any) -> None:
    from compressed_format.dtypes import torch_dtype
    from compressed_format.streaming import decompress_checkpoint

    with _job(source, destination, "decompressed", quiet=quiet) as progress:
        wanted = None if dtype is None else torch_dtype(dtype)
        decompress_checkpoint(source, destination, dtype=wanted, progress=progress, **options)


def _read_config(config: str) -> Any:
    """The config in a file or of a preset, by the rules of :func:`compressed_format.compress`, without torch."""
    from compressed_format.config import PRESETS, QuantizationConfig

    path = Path(config)
    bare = not path.suffix and len(path.parts) == 1 and not path.exists()
    if config.upper() in PRESETS or bare:
        return QuantizationConfig.preset(config)
    return QuantizationConfig.from_file(path)


@contextmanager
def _job(source: Path, destination: Path, done: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show the job's progress, and say how it ended. What fails before there is any has not begun."""
    started = time.monotonic()
    began = False
    try:
        with nullcontext() if quiet else progress_on(str(destination)) as shown:

            def progress(done: int, total: int) -> None:
                nonlocal began
                began = True
                if shown is not None:
                    shown(done, total)

            yield progress
    except KeyboardInterrupt as error:
        raise Failure(f"interrupted: {_way_on(destination)}", ExitCode.INTERRUPTED) from error
    except CheckpointExistsError as error:
        message = "already holds something; choose another destination, or --overwrite to replace it whole"
        raise Failure(f"error: {destination}: {message}", ExitCode.WRONG) from error
    except CompressedFormatError as error:
        raise Failure(f"error: {error}", ExitCode.FOUND if began else ExitCode.WRONG) from error
    if not quiet:
        bytes_in, bytes_out = _nbytes(source), _nbytes(destination)
        ratio = f", {100 * bytes_out / bytes_in:.1f} % of {size(bytes_in)}" if bytes_in else ""
        took = duration(time.monotonic() - started)
        click.echo(f"{printable(str(destination))}: {done}, {size(bytes_out)}{ratio}, in {took}")


def _way_on(destination: Path) -> str:
    from compressed_format.checkpoint.partial_folder import JOB_SUFFIX

    if destination.with_name(destination.name + JOB_SUFFIX).exists():
        return f"{destination}.partial keeps what is done, and the same command goes on from there"
    return "nothing of it is kept, and the same command starts anew"


def _nbytes(path: Path) -> int:
    """How many bytes the tensors of a checkpoint take."""
    from compressed_format.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    return sum(checkpoint.spec(name).nbytes for name in checkpoint)
