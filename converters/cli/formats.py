"""`nibblecast formats [NAME]`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nibblecast.converters import plugins
from nibblecast.converters.cli.arguments import Json, cell, print_json, table_console
from nibblecast.converters.errors import MOST_OF_MESSAGE, line
from nibblecast.converters.options import describe


def formats(
    name: Annotated[str | None, typer.Argument(help="Show this format's own options.")] = None, json: Json = False
) -> None:
    """List the formats that can be read and written, or the options of one format."""
    known = plugins.all_formats().values() if name is None else [plugins.format_named(name)]
    documents = [_document(format, with_options=name is not None) for format in known]
    if json:
        print_json(documents if name is None else documents[0])
    elif name is None:
        _print_all(documents)
    else:
        _print_one(documents[0])


def _document(format: plugins.Format, *, with_options: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": format.name,
        "description": format.description,
        "extensions": list(format.extensions),
        "reads": bool(format.reader),
        "writes": bool(format.writer),
    }
    if with_options:
        written = describe(plugins.writer(format).options) if format.writer else []
        document["options"] = [
            {"name": o.name, "values": o.values, "default": o.default, "help": o.help}
            for o in (*plugins.reader_options(format), *written)
        ]
    return document


def _print_all(documents: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("format", "extensions", "reads", "writes", "what it is"):
        table.add_column(column)
    for d in documents:
        reads, writes = ("yes" if d[verb] else "-" for verb in ("reads", "writes"))
        cells = d["name"], " ".join(d["extensions"]), reads, writes, d["description"]
        table.add_row(*(cell(text, MOST_OF_MESSAGE) for text in cells))
    table_console().print(table)


def _print_one(document: dict[str, Any]) -> None:
    from rich.table import Table

    verbs = " and ".join(verb for verb, does in (("read", document["reads"]), ("written", document["writes"])) if does)
    print(line(f"{document['name']}: {document['description']}", MOST_OF_MESSAGE))
    print(f"extensions {' '.join(document['extensions']) or 'none'}; can be {verbs or 'neither read nor written'}")
    if not document.get("options"):
        print("no options of its own")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("--opt", "values", "default", "what it does"):
        table.add_column(column, overflow="fold")
    for option in document["options"]:
        table.add_row(*(cell(option[key], MOST_OF_MESSAGE) for key in ("name", "values", "default", "help")))
    table_console().print(table)
