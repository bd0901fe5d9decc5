"""`ultramem generate`: continue prompts; a single one is streamed to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultramem.cli.loading import Precision, choose_device, find_model_folder, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, or a run folder (its newest model is taken).")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; - reads it from standard input. Repeat it for a batch.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file of prompts, one a line: a batch.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; larger is more varied.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: an accelerator if present.")] = None,
    precision: Annotated[Precision, typer.Option(help="Of weights and KV cache.")] = Precision.fp32,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model first: minutes, for long generations.")
    ] = False,
) -> None:
    """Continue prompts and print them: one as it is made, several once all are done."""
    from ultramem.inference.generate import generate_batch, generate_stream

    folder = find_model_folder(checkpoint)
    texts = _read_prompts(prompt or [], prompt_file)
    model, tokenizer = load_model(folder, choose_device(device)), load_tokenizer(folder)
    model = model.to(precision.torch_dtype)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "compiled": compile,
    }
    start_s = time.perf_counter()
    if len(texts) == 1:
        continuations = [_print_stream(texts[0], generate_stream(model, tokenizer, texts[0], **options))]
    else:
        continuations = generate_batch(model, tokenizer, texts, **options)
        sys.stdout.write("\n".join(text + more + "\n" for text, more in zip(texts, continuations, strict=True)))
    _report_speed(tokenizer, continuations, time.perf_counter() - start_s)


def _print_stream(text: str, stream: Iterator[str]) -> str:
    """Print a prompt and its continuation, which is returned."""
    sys.stdout.write(text)
    pieces = []
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    sys.stdout.write("\n")
    return "".join(pieces)


def _report_speed(tokenizer: PreTrainedTokenizerBase, continuations: list[str], elapsed_s: float) -> None:
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in continuations)
    typer.echo(f"{num_tokens} tokens in {elapsed_s:.1f} s: {num_tokens / elapsed_s:.1f} tokens/s", err=True)


def _read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """All prompts, in their order.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    from ultramem.errors import ConfigError

    texts = [_read_standard_input() if prompt == "-" else prompt for prompt in prompts]
    if file is not None:
        try:
            texts += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the prompts in {file} cannot be read ({error}): give a UTF-8 text file with one prompt a line."
            ) from error
    if not texts:
        raise ConfigError("there is nothing to continue: give --prompt TEXT, or --prompt-file with at least one line.")
    return texts


def _read_standard_input() -> str:
    from ultramem.errors import ConfigError

    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the prompt on standard input is not {error.encoding} text (byte {error.start}: {error.reason}): convert "
            f"it, for example with `iconv -t UTF-8`."
        ) from error
