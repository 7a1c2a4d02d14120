"""What a process need not load when it starts."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence


def defer_pandas() -> None:
    """Keep pyarrow from importing pandas at its first conversion: a second of CPU and 60 MB in every process.

    pyarrow looks for pandas once, to know whether what it is given might be a Series; here it is told that there is none.
    As soon as anything imports pandas (`to_pandas()`, an operator of a user's own) pyarrow is told of it, so that
    conversions are the same from then on. Does nothing when pandas is loaded already.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    absent = types.ModuleType("pandas")
    absent.__version__ = "0"  # type: ignore[attr-defined]
    sys.modules["pandas"] = absent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "pandas 0 is installed"
            pa.array([0])
    finally:
        del sys.modules["pandas"]
    sys.meta_path.insert(0, _PandasFinder())


class _PandasFinder(importlib.abc.MetaPathFinder):
    """Tells pyarrow when pandas has been imported after all, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "pandas":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            load = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                load(module)
                import pyarrow as pa

                pa.lib._pandas_api.pd  # noqa: B018 - looks for pandas again and finds it

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
