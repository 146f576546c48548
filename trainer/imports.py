"""transformers, PEFT and accelerate, without the parts of them that no run of ours enters: 0.9 s instead of 4 s, and half of the files.

transformers asks for torch's compiler, for distributed tensors and for its own serving engine while it is imported, whether or not anything
will use them, and opens every model's source (2,500 files) to learn what is in it. `lean` imports it with stand-ins for these. They are taken
away again afterwards: whoever wants the compiler later gets the real one, and a model name that was not looked for is looked for then.

A version of transformers that needs more than a stand-in gives an ImportError or AttributeError here; then the process starts again with
MILKTEA_PLAIN_IMPORTS=1, and everything is imported as usual.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PLAIN = "MILKTEA_PLAIN_IMPORTS"
PROBES = "transformers.utils.import_utils"
FOLDERS = ("auto", "bloom")  # of transformers/models: what we name, and what PEFT names when it is imported
COMPILER = "torch._dynamo"
SHAPES = "torch._meta_registrations"  # what torch's operators would give for tensors without memory: 0.4 s, for the compiler and DTensors
MARKS = ("allow_in_graph", "assume_constant_result", "clear_lru_cache", "disable", "graph_break")

# module -> what transformers takes from it at import, to name it in an annotation or as a base
STAND_INS: dict[str, tuple[str, ...]] = {
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex", "trace_wrapped"),  # the second in torch 2.11
    "torch.nn.attention.flex_attention": ("BlockMask", "create_block_mask", "flex_attention", "_DEFAULT_SPARSE_BLOCK_SIZE", "AuxRequest"),
    "transformers.generation.continuous_batching": ("PagedAttentionCache", "ContinuousMixin", "ContinuousBatchingManager"),
    "transformers.generation.continuous_batching.cache": ("PagedAttentionCache",),
}


def unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands in for MARKS, as a decorator, plain or with arguments, or as a call. They tell the compiler what to leave alone; it never comes."""
    return function if callable(function) else unmarked


class _Late(ModuleType):
    """Gives way to the real module when something is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(made_way(self.__name__)), name)


class _Compiler(_Late):
    """torch asks it in every optimizer step to look away, and to forget its rules when processes meet."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == COMPILER and name == "trace_rules":
            return _Compiler(f"{COMPILER}.trace_rules")
        return unmarked if name in MARKS else super().__getattr__(name)


def made_way(name: str = COMPILER) -> str:
    """`name`, after putting the stand-in away that is in front of it. Who asks for the compiler needs the shapes too."""
    put_away(COMPILER)
    if stands_in(SHAPES):
        put_away(SHAPES)
        importlib.import_module(SHAPES)
    return name


class _NoTensors(ModuleType):
    """torch.distributed.tensor before anybody imported it: nothing can be a DTensor yet. PEFT asks that of every weight."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing if name == "DTensor" else getattr(importlib.import_module(made_way("torch.distributed.tensor")), name)


class _Nothing:
    """Has no instances."""


class _Finder:
    """Answers for `names`; hands out transformers' own module of probes with two of them answered beforehand."""

    def __init__(self, names: Collection[str] = (), whole: bool = False) -> None:
        self._names, self._whole = set(names), whole

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in self._names:
            self._names.remove(name)  # once: when it was put away, the next import means the real one
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        if name.startswith(COMPILER + ".") and stands_in(COMPILER):
            return PathFinder.find_spec(name, importlib.import_module(made_way()).__path__, target)
        if name != PROBES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def answered(module: ModuleType) -> None:
                run(module)
                answer(module, self._whole)

            spec.loader.exec_module = answered  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return {COMPILER: _Compiler, SHAPES: _Late}.get(spec.name, ModuleType)(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name in STAND_INS.get(module.__name__, ()):
            setattr(module, name, type(name, (), {}))


def answer(probes: ModuleType, whole: bool) -> None:
    """Unless the job spreads one model over processes (`whole`), transformers is told that there are no distributed tensors. The folders of
    models are not read, but for FOLDERS."""
    if not whole:
        probes.is_torch_distributed_available = lambda: False  # type: ignore[attr-defined]
    read = probes.create_import_structure_from_path

    def read_some(path: str | Path) -> dict[str, Any]:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        if folder.name != "models":
            return read(path)
        return {name: read(folder / name) for name in FOLDERS if (folder / name).is_dir()}

    probes.create_import_structure_from_path = read_some  # type: ignore[attr-defined]
    probes.read_all_models = read  # type: ignore[attr-defined]


def find_late(probes: ModuleType) -> None:
    """A name that `transformers` is asked for and does not know is looked for in all models' folders then, once."""
    import transformers

    if not hasattr(probes, "read_all_models"):
        return

    lazy: Any = type(transformers)

    class Late(lazy):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or self.__dict__.get("_all_models"):
                    raise
            self._all_models = True
            vars(probes)["create_import_structure_from_path"] = probes.read_all_models
            probes.define_import_structure.cache_clear()
            models = Path(self.__file__).parent / "models"
            every = lazy(self.__name__, self.__file__, probes.define_import_structure(models, prefix="models"))
            self._modules |= every._modules
            self._object_missing_backend |= every._object_missing_backend
            self._class_to_module.update({k: v for k, v in every._class_to_module.items() if k not in self._class_to_module})
            return getattr(self, name)

    transformers.__class__ = Late


@contextmanager
def standing_in(names: Collection[str], whole: bool = False) -> Iterator[None]:
    """While this lasts `names` of STAND_INS are in place, except for those that are imported already."""
    names = {name for name in names if name not in sys.modules}
    finder = _Finder(names, whole)
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in names:
            put_away(name)


def stands_in(name: str) -> bool:
    return isinstance(getattr(getattr(sys.modules.get(name), "__spec__", None), "loader", None), _Finder)


def put_away(name: str) -> None:
    """Takes a stand-in from sys.modules and from its parent, so that the next import finds the real module."""
    if not stands_in(name):
        return
    module = sys.modules.pop(name)
    parent, _, last = name.rpartition(".")
    if vars(sys.modules.get(parent, ModuleType(""))).get(last) is module:
        delattr(sys.modules[parent], last)


def begin(quantised: bool, whole: bool) -> None:
    """The part of `lean` that goes without torch, while a thread has the system load torch's libraries (0.3 s; more where they are on a cold
    disk). Call when the environment is as torch should find it: OMP_NUM_THREADS counts when they are loaded."""
    if os.environ.get(PLAIN):
        return
    libraries = threading.Thread(target=load_libraries, name="libraries")
    libraries.start()
    if not quantised and not whole and "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder([SHAPES]))  # type: ignore[arg-type]  # until somebody asks for the compiler
    try:
        _names(quantised, whole)
    except (ImportError, AttributeError) as error:
        plainly(error)
    libraries.join()


def load_libraries() -> None:
    """torch's libraries, as `import torch` will load them again at no cost. Where they are elsewhere it will find them by itself."""
    spec = PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    load = ctypes.CDLL(None).dlopen  # ctypes.CDLL would hold Python's lock while it loads
    load.restype = ctypes.c_void_p
    for name, mode in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", 0)):
        load(bytes(Path(spec.origin).parent / "lib" / name), os.RTLD_NOW | mode)


def lean(quantised: bool, whole: bool) -> None:
    """Imports what a run needs. `quantised`: with bitsandbytes. `whole`: with torch's distributed tensors, for one model in parts. Safe to
    call again, and where transformers' models are imported already it changes nothing."""
    if not quantised:
        without_bitsandbytes()
    if "transformers.modeling_utils" in sys.modules or os.environ.get(PLAIN):
        return
    if COMPILER not in sys.modules:
        sys.meta_path.insert(0, _Finder([COMPILER]))  # type: ignore[arg-type]  # stays: it gives way to the real one by itself
    try:
        _names(quantised, whole)
        with without_collection(), standing_in(STAND_INS):
            import peft  # noqa: F401
            import torch
            import transformers.models.auto.modeling_auto  # noqa: F401
    except (ImportError, AttributeError) as error:
        plainly(error)
    if "torch.distributed.tensor" not in sys.modules and torch.distributed.is_available():
        torch.distributed.tensor = _NoTensors("torch.distributed.tensor")
    find_late(sys.modules[PROBES])


def _names(quantised: bool, whole: bool) -> None:
    if not quantised:
        without_bitsandbytes()
    with standing_in((), whole):
        import transformers  # noqa: F401


def without_bitsandbytes() -> None:
    """PEFT imports bitsandbytes wherever it is installed, and with it torch's compiler: 2 s of start-up, for nothing unless it quantises."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


@contextmanager
def without_collection() -> Iterator[None]:
    """Imports make a million objects that stay: looking through them for garbage is a tenth of the time. Afterwards they are never looked at."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def plainly(error: Exception) -> NoReturn:
    """Starts this process again, so that nothing half-imported is left, without stand-ins."""
    print(f"transformers could not be imported without its unused parts ({error}): importing all of it", file=sys.stderr, flush=True)
    os.environ[PLAIN] = "1"
    os.execv(sys.executable, sys.orig_argv)
