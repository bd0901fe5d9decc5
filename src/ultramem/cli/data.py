"""`ultramem data`: make token files out of text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ultramem.data.manifest import DataManifest

data_app = typer.Typer(help="Make the token files that training and evaluation read.", no_args_is_help=True)


@data_app.callback()
def _group() -> None:
    """Make the token files that training and evaluation read."""


@data_app.command("prepare")
def prepare_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text files, folders of .txt or .md files, .jsonl(.gz, .zst) or .parquet files, data sets on the "
            "Hugging Face hub (owner/name or owner/name:configuration), or the corpora factbook and wikipedia-leads.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    tokenizer: Annotated[
        str, typer.Option(help="Tokenizer folder, file or hub name, or train:N to train a byte-level BPE of N tokens.")
    ] = "train:4096",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents for the validation part, between 0 and 1.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Changes the validation part and the order of the documents.")] = 0,
    text_field: Annotated[
        str, typer.Option(help="Field with the text in rows of .jsonl, .parquet and data sets.")
    ] = "text",
    split: Annotated[str, typer.Option(help="Split of a data set on the hub.")] = "train",
    max_part_tokens: Annotated[int, typer.Option(help="Largest number of tokens in one file.")] = 2**30,
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of the model's embedding, if larger than the tokenizer's vocabulary.")
    ] = None,
    eos_token: Annotated[
        str | None, typer.Option(help="Token that ends a document, if not the tokenizer's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make an existing data folder anew.")] = False,
) -> None:
    """Turn text into token files with a training and a validation part."""
    # transformers and tokenizers take seconds to import.
    from ultramem.data.prepare import PrepareConfig, prepare

    config = PrepareConfig(
        sources=tuple(sources),
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        seed=seed,
        text_field=text_field,
        split=split,
        max_part_tokens=max_part_tokens,
        vocab_size=vocab_size,
        eos_token=eos_token,
    )
    try:
        manifest, made = prepare(config, output, overwrite=overwrite, show_progress=True)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: nothing was written to {output}.", err=True)
        raise typer.Exit(130) from None
    if not made:
        typer.echo(f"{output} is up to date (same arguments, same sources); --overwrite makes it anew.")
    _print_summary(manifest)


def _print_summary(manifest: "DataManifest") -> None:
    """One short table of the parts, and the fingerprint."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "documents", "tokens", "bytes", "bytes per token")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest.splits.items():
        counts = (split.num_documents, split.num_tokens, split.num_bytes)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{split.bytes_per_token:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{manifest.folder}: {manifest.dtype}, vocabulary {manifest.vocab_size:,}, fingerprint {manifest.fingerprint}",
        soft_wrap=True,
        highlight=False,
    )
