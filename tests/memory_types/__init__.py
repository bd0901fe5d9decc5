"""What the tests need of every memory type: a module for each, named like the type, that defines

- ``SIZES``: the smallest settings of a layer,
- ``VARIANTS``: by name, what a variant changes about them; the contract tests run over all variants,
- ``COMPILED``: (variant, whether training) whose compilation is tested every time; other compilations are slow tests,
- ``CHANGES``: for every setting, (what is set before, a change) after which something must differ,
- ``STRATEGIES``: hypothesis strategies for settings of the type's own,
- ``DECODER``: what the memories of a decoder change about ``SIZES``,
- ``naive(layer, pool, x_ND)``: the definition in loops, of one sequence of tokens and one of three memories: (output
  [N, D], virtual slots per token).
"""

import importlib

NAMES = ("SIZES", "VARIANTS", "COMPILED", "CHANGES", "STRATEGIES", "DECODER", "naive")


def memory_type(name):
    """The module of a memory type."""
    file = f"tests/memory_types/{name}.py"
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise ModuleNotFoundError(
            f"the memory type {name!r} has no tests: add {file} with {', '.join(NAMES)}; "
            "CONTRIBUTING.md, Adding a layer, shows one"
        ) from None
    missing = [attribute for attribute in NAMES if not hasattr(module, attribute)]
    if missing:
        raise AttributeError(f"{file} lacks {', '.join(missing)}; tests/memory_types/__init__.py says what each means")
    return module
