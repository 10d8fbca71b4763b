"""``gearshift serve``: a supernet behind OpenAI's API, every request at the speed of its preset."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated

import typer

from gearshift.cli.options import DeviceOption, SupernetArgument
from gearshift.cli.tables import print_table
from gearshift.errors import GearshiftError
from gearshift.placement import Placement, short_name
from gearshift.presets import Preset
from gearshift.serve.catalog import Catalog

KEPT = "nothing is written by this command"

ENGINE = """\
engine: embedded. Without vLLM on a GPU, requests run on Transformers, each alone, a token at a time in turns:
made for laptops and tests; the same API, not the same speed."""


class ServeError(GearshiftError):
    """A server is asked for that cannot be."""


def run(
    supernet: SupernetArgument,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; without it, the directory's.")
    ] = None,
    default_preset: Annotated[
        str | None, typer.Option(help="The preset that the name alone means; else the supernet's placement.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences decoded side by side.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Sequences that may wait behind them.")] = 64,
    admin_key_env: Annotated[
        str | None,
        typer.Option(help="Let presets be added and removed with the key in this environment variable."),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve a supernet over HTTP; requests name a preset as NAME:PRESET, or spell out a placement."""
    catalog = Catalog.from_directory(supernet, name, default_preset)
    admin_key = None if admin_key_env is None else _key(admin_key_env)

    from gearshift.serve.embedded import EmbeddedServer, EngineSettings, cache_bytes, listen
    from gearshift.supernet import load_supernet
    from gearshift.train.device import choose_device
    from gearshift.train.tokens import load_tokenizer

    # Before the model is loaded: an address that is taken should be known at once.
    with listen(host, port) as listening:
        model = load_supernet(supernet, device=choose_device(device))
        context = model.config.max_position_embeddings
        settings = EngineSettings(max_running, max_waiting)
        server = EmbeddedServer(model, load_tokenizer(supernet), catalog, settings, admin_key)
        # Ctrl-C is how a server is meant to end.
        with contextlib.suppress(KeyboardInterrupt):
            _announce(catalog, context, lambda placement: cache_bytes(model, placement, context))
            _say_where(host, listening.getsockname()[1], catalog, admin_key is not None)
            server.run(listening)
    typer.echo("stopped")


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ServeError(
            f"the environment variable {variable} is empty; put the administrators' key into it, or leave "
            "--admin-key-env out"
        )
    return key


def _announce(catalog: Catalog, context: int, cache_bytes: Callable[[Placement], int]) -> None:
    """What is served, as a table."""
    columns = ("model", *(short_name(mixer) for mixer in catalog.space.mixers), "retention", "cache")
    print_table(
        f"models; cache is bytes a sequence at {context:,} tokens",
        columns,
        _rows(catalog.models(), catalog.presets.values(), catalog.space.mixers, cache_bytes),
    )


def _rows(
    models: Mapping[str, Placement],
    presets: Iterable[Preset],
    mixers: Iterable[str],
    cache_bytes: Callable[[Placement], int],
) -> Iterator[tuple[str, ...]]:
    retentions = {preset.placement: preset.retention for preset in presets}
    for model, placement in models.items():
        retention = retentions.get(placement)
        counts = placement.counts()
        yield (
            model,
            *(str(counts.get(mixer, 0)) for mixer in mixers),
            "-" if retention is None else f"{retention:.1%}",
            f"{cache_bytes(placement):,}",
        )


def _say_where(host: str, port: int, catalog: Catalog, administered: bool) -> None:
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    typer.echo(ENGINE)
    typer.echo(f"listening at {base}/v1 (health: {base}/health, metrics: {base}/metrics); Ctrl-C stops it")
    if administered:
        typer.echo(f"presets can be added and removed at {base}/v1/presets with the key")
    example = next(reversed(catalog.models()))
    typer.echo(
        f"try: curl {base}/v1/completions -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{example}", "prompt": "def fibonacci(n):"}}'"""
    )
