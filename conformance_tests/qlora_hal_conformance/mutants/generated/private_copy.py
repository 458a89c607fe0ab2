"""The reference backend imported a second time, under names of its own, with at most one change.

The oracle computes for the reference backend and judges it. A change in the oracle itself would be made in the judge as
well, and nothing would differ; so a mutant has an oracle of its own.
"""

from __future__ import annotations

import ast
import importlib
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from qlora_hal.contract.backend import BackendSpec

from .changes import changed
from .identity import Identity
from .reached import noting
from .sources import BACKEND, COPIED, MODULES, file_of

HONEST, NOTING = "honest", "noting"
"""The copy without a change, and the same noting which statements it reaches."""


@dataclass(frozen=True, slots=True)
class PrivateCopy(MetaPathFinder, Loader):
    """Finds `PREFIX_<n>...` where the original is `COPIED[n]...`. `identity` is that of the change, or no change's."""

    identity: str

    @property
    def prefix(self) -> str:
        return f"changed_{zlib.crc32(self.identity.encode()):08x}"

    @property
    def spec(self) -> BackendSpec:
        spec = importlib.import_module(self.name(BACKEND)).SPEC
        assert isinstance(spec, BackendSpec)
        return replace(spec, trainer=f"{__package__}.trainers:{self.identity}")

    def open_trainer(self) -> object:
        module = importlib.import_module(self.name(f"{BACKEND}.trainer"))
        return module.ReferenceTrainer(spec=self.spec)

    def name(self, original: str) -> str:
        """What a module of the original is called in the copy; its own name where it is shared."""
        for number, root in enumerate(COPIED):
            if original == root or original.startswith(f"{root}."):
                return f"{self.prefix}_{number}{original.removeprefix(root)}"
        return original

    def original(self, name: str) -> str | None:
        """The inverse of `name`, None for a module that is not of this copy."""
        top, dot, rest = name.partition(".")
        number = top.removeprefix(f"{self.prefix}_")
        return f"{COPIED[int(number)]}{dot}{rest}" if number != top and number.isdigit() else None

    def forget(self) -> None:
        """Take every module of this copy out of the process."""
        sys.meta_path.remove(self)
        for name in [name for name in sys.modules if self.original(name) is not None]:
            del sys.modules[name]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        original = self.original(fullname)
        if original is None:
            return None
        file = file_of(original)
        spec = ModuleSpec(fullname, self, origin=str(file), is_package=file.name == "__init__.py")
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        original = self.original(module.__name__)
        assert original is not None
        file = file_of(original)
        tree = self._tree(original, file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                node.module = self.name(node.module)
        exec(compile(tree, str(file), "exec"), module.__dict__)

    def _tree(self, original: str, source: str) -> ast.Module:
        if self.identity == NOTING:
            return noting(ast.parse(source), original)
        if self.identity == HONEST:
            return ast.parse(source)
        change = Identity.read(self.identity)
        return changed(source, change.where) if MODULES[change.module] == original else ast.parse(source)


def private_copy(name: str) -> PrivateCopy:
    """The copy with a change, by its identity; `HONEST` and `NOTING` are those without one.

    Raises AttributeError for another name: modules that offer copies as their attributes ask here.
    """
    known = next((copy for copy in sys.meta_path if isinstance(copy, PrivateCopy) and copy.identity == name), None)
    if known is not None:
        return known
    if name not in (HONEST, NOTING) and name.partition(":")[0] not in MODULES:
        raise AttributeError(name)
    copy = PrivateCopy(name)
    sys.meta_path.append(copy)
    return copy
