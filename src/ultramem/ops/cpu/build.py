"""Building and loading the C++ kernels: once per source, flags, CPU features, compiler and version of PyTorch."""

import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
NAME = "ultramem_cpu"

_COMMON_FLAGS = ("-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# What PyTorch calls the CPU's capability, which ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers for tests. Vectors
# are written in the compiler's own notation, so that everything else takes whatever its baseline has.
_CAPABILITY_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}

_lock = threading.Lock()
_answer: list[str | None] = []
_loaded: list[ModuleType] = []


def why_unavailable() -> str | None:
    """Build and load the kernels on the first call. Returns None, or why that failed, in one line."""
    with _lock:
        if not _answer:
            _answer.append(_try_to_load())
        return _answer[0]


def direct_calls() -> ModuleType | None:
    """The kernels that Python may call past PyTorch's dispatcher (``bindings.cpp``); None where none are loaded."""
    return _loaded[0] if _loaded else None


def compiler_flags() -> tuple[str, ...]:
    """Flags of every source file on this CPU."""
    return (*_COMMON_FLAGS, *_CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _try_to_load() -> str | None:
    try:
        _loaded.append(_load())
    except OSError as error:
        return f"the C++ kernels cannot be built or loaded: {error}"
    except (ImportError, RuntimeError, subprocess.SubprocessError) as error:
        return f"the C++ kernels cannot be built: {_first_line(str(error))}"
    return None


def _load() -> ModuleType:
    # Takes a while to import, and needs setuptools.
    from torch.utils import cpp_extension

    sources = sorted(FOLDER.glob("*.cpp"))
    flags = compiler_flags()
    compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    fingerprint = hashlib.sha256(
        repr((flags, torch.__version__, compiler, sysconfig.get_config_var("EXT_SUFFIX"))).encode()
    )
    for path in (*sources, *sorted(FOLDER.glob("*.h"))):
        fingerprint.update(path.name.encode() + path.read_bytes())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    home = root / f"{NAME}_{fingerprint.hexdigest()[:16]}"
    library = home / f"{NAME}.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        # The operating system lets go of this lock however a process ends; torch's own lock file would stay behind.
        with open(root / f"{home.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                return _build(cpp_extension, sources, flags, home)
    # Loading also registers torch.ops.ultramem_cpu.
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return kernels


def _build(cpp_extension, sources: list[Path], flags: tuple[str, ...], home: Path) -> ModuleType:  # type: ignore[no-untyped-def]
    """Build beside the final folder, load, and rename: a folder with the final name is complete."""
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        raise RuntimeError(f"there is no C++ compiler ({cpp_extension.get_cxx_compiler()}) on the PATH; install g++")
    logger.info("building the C++ kernels, once, in %s", home)
    working = Path(tempfile.mkdtemp(prefix=home.name, dir=home.parent))
    try:
        with _scripts_on_path():
            kernels: ModuleType = cpp_extension.load(
                NAME,
                [str(path) for path in sources],
                extra_cflags=list(flags),
                extra_ldflags=["-fopenmp"],
                build_directory=str(working),
            )
        working.rename(home)
        return kernels
    finally:
        shutil.rmtree(working, ignore_errors=True)


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Let the ninja be found that was installed beside an interpreter whose environment nobody activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _first_line(text: str) -> str:
    """The compiler's first error in a build's output, else the first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return next(iter(errors + lines), "no reason was given")
