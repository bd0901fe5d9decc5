"""`ultramem generate`: continue a prompt, streaming to the terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ultramem.cli.loading import choose_device, find_model_folder, load_model, load_tokenizer


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, or a run folder (its newest model is taken).")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; larger is more varied.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: an accelerator if present.")] = None,
) -> None:
    """Continue a prompt and print it as it is made."""
    from ultramem.inference.generate import generate_stream

    folder = find_model_folder(checkpoint)
    text = _read_standard_input() if prompt == "-" else prompt
    model, tokenizer = load_model(folder, choose_device(device)), load_tokenizer(folder)
    stream = generate_stream(
        model, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    sys.stdout.write(text)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _read_standard_input() -> str:
    from ultramem.errors import ConfigError

    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the prompt on standard input is not {error.encoding} text (byte {error.start}: {error.reason}): convert "
            f"it, for example with `iconv -t UTF-8`."
        ) from error
