"""What forge says over NATS, for machines."""

from __future__ import annotations

import click


@click.command()
def asyncapi() -> None:
    """Print the AsyncAPI document of the messages other services may read.

    The one in docs/asyncapi.json is made by it; for code generators and catalogues. docs/SUBSCRIBERS.md says
    how to read them.
    """
    import msgspec

    from forge.asyncapi import document

    click.echo(msgspec.json.format(msgspec.json.encode(document()), indent=2).decode())
