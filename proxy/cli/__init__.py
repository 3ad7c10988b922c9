"""The command `breakwater`.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 it did not work, 2 wrong usage. What a command
needs is imported when the command runs, so that `--help` costs nothing but itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from proxy import __version__

app = typer.Typer(
    name="breakwater",
    help="An OpenAI-compatible reverse proxy that keeps agents running.",
    rich_markup_mode=None,  # the plain help is there in half the time
    pretty_exceptions_enable=False,  # a traceback must not show local variables: they can hold keys
)
config_app = typer.Typer(help="Show the effective configuration, or its schema.", rich_markup_mode=None)
app.add_typer(config_app, name="config")
keys_app = typer.Typer(help="Make keys at run time, list them, revoke them, rotate them.", rich_markup_mode=None)
app.add_typer(keys_app, name="keys")

_ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", exists=True, dir_okay=False, help="The configuration file.")
]
_Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
_KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `keys list` shows it.")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes any free one.")]
_Host = Annotated[str, typer.Option(help="Address to listen on.")]


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["health"]:
        # Past typer, which takes a fifth of a second to read options: every container asks this every few seconds.
        from proxy.cli.health import run

        run(sys.argv[2:])
    else:
        app()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"breakwater {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@config_app.callback(invoke_without_command=True)
def _config_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@keys_app.callback(invoke_without_command=True)
def _keys_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def serve(
    config: _ConfigFile,
    host: Annotated[str | None, typer.Option(help="Listen here instead of at listen.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Listen here instead of at listen.port; 0 takes any free one.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow other machines in without any key.")] = False,
) -> None:
    """Run the proxy."""
    from proxy.cli.serve import run

    run(config, host, port, insecure)


@app.command()
def demo(host: _Host = "127.0.0.1", port: _Port = 8080) -> None:
    """Run the proxy with no configuration at all, to try it out."""
    from proxy.cli.demo import run

    run(host, port)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="The configuration file.")],
    as_json: _Json = False,
) -> None:
    """Check a configuration without starting anything: exit 0 if it is valid, 1 if not."""
    from proxy.cli.check import run

    run(file, as_json)


# So that it is listed, and works where `app` is called: see `main`.
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def health(context: typer.Context) -> None:
    """Ask a running process how it is: exit 0 if well, 1 if not."""
    from proxy.cli.health import run

    run(context.args)


@app.command()
def usage(
    config: _ConfigFile,
    since: Annotated[str, typer.Option(metavar="SPAN", help="How far back, in whole hours: 30m, 24h, 7d.")] = "24h",
    by: Annotated[
        str, typer.Option(metavar="LIST", help="Any of tenant, key, model, provider, tags, quality.")
    ] = "tenant,model",
    as_json: _Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="For a spreadsheet: a head and the rows.")] = False,
    host: Annotated[str | None, typer.Option(help="Where the process listens, if not at listen.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where it serves /admin, if not at the port of the file.")
    ] = None,
) -> None:
    """Show what was used and what it cost. Reads Redis; with memory:// it asks the running process."""
    from proxy.cli.usage import run

    run(config, since, by, as_json=as_json, as_csv=as_csv, host=host, port=port)


@app.command()
def mock(
    host: _Host = "127.0.0.1",
    port: _Port = 8089,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and request give the same reply.")] = 0,
    script: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Scripted replies, in YAML.")
    ] = None,
    tokens_per_second: Annotated[float, typer.Option(min=0, help="Pace of streams; 0 is as fast as possible.")] = 0,
    first_token_ms: Annotated[float, typer.Option(min=0, help="Milliseconds before the first token.")] = 0,
    prompt_cache: Annotated[
        bool, typer.Option("--prompt-cache", help="Tell in the usage how much of a prompt was sent before.")
    ] = False,
) -> None:
    """Run the mock provider as a server of its own: an upstream for trials and for rehearsing faults."""
    from proxy.cli.mock import run

    run(
        host,
        port,
        seed,
        script,
        tokens_per_second=tokens_per_second,
        first_token_ms=first_token_ms,
        prompt_cache=prompt_cache,
    )


@config_app.command("show")
def config_show(config: _ConfigFile, as_json: _Json = False) -> None:
    """Print every value in effect and where it comes from; secrets are masked."""
    from proxy.cli.config import show

    show(config, as_json)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    from proxy.cli.config import schema

    schema()


@keys_app.command("create")
def keys_create(
    config: _ConfigFile,
    tenant: Annotated[str, typer.Option(help="The tenant whose key it is, one of the configuration.")],
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    expires: Annotated[str | None, typer.Option(metavar="SPAN", help="How long it is valid: 30m, 24h, 90d.")] = None,
    models: Annotated[
        str | None, typer.Option(metavar="GLOBS", help="What it may ask for, of what its tenant may: 'gpt-4o*,o3*'.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMITS", help="What it may spend: tokens_per_minute=10000,usd_per_day=5 (repeatable)."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a key and print its secret, once, to stdout. Replicas know it within 2 seconds."""
    from proxy.cli.keys import create

    create(config, tenant, name=name, expires=expires, models=models, budget=budget or [], as_json=as_json)


@keys_app.command("list")
def keys_list(
    config: _ConfigFile,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that expired or were revoked, too.")] = False,
    as_json: _Json = False,
) -> None:
    """List keys, without their secrets."""
    from proxy.cli.keys import list_keys

    list_keys(config, tenant=tenant, everything=everything, as_json=as_json)


@keys_app.command("revoke")
def keys_revoke(config: _ConfigFile, key_id: _KeyId, as_json: _Json = False) -> None:
    """End a key for good. Replicas refuse it within 2 seconds."""
    from proxy.cli.keys import revoke

    revoke(config, key_id, as_json=as_json)


@keys_app.command("rotate")
def keys_rotate(
    config: _ConfigFile,
    key_id: _KeyId,
    overlap: Annotated[
        str, typer.Option(metavar="SPAN", help="How long secrets of before stay valid; 0s: end.")
    ] = "24h",
    as_json: _Json = False,
) -> None:
    """Give a key a new secret and print it, once, to stdout."""
    from proxy.cli.keys import rotate

    rotate(config, key_id, overlap=overlap, as_json=as_json)
