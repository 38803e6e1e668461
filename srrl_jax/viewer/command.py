"""`srrl view`."""

from typing import Annotated

import typer


def view(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories; two to compare.")],
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8765,
    host: Annotated[str, typer.Option(help="Off loopback a token is asked for.")] = "127.0.0.1",
    export: Annotated[str | None, typer.Option(metavar="DIR", help="Write files; no server.")] = None,
) -> None:
    """Show every sample of runs in a browser, while they grow; or write that page as files (to RUN/view)."""
    from srrl_jax.viewer.index import Index

    if export is None:
        from srrl_jax.viewer.server import serve

        serve(Index(runs), host, port)
        return
    from srrl_jax.viewer.export import export as write

    with Index(runs) as index:
        print(f"viewer: {write(index, export)}")
