"""``import deep_ep`` with ``$(anyep compat-path)`` on PYTHONPATH: this name becomes :mod:`anyep.compat.deep_ep`.

Every submodule is registered under both names, so that there is one class of each kind whichever way it was imported.
"""

import importlib
import pkgutil
import sys

_REAL = "anyep.compat.deep_ep"
_real = importlib.import_module(_REAL)
sys.modules[__name__] = _real
for _found in pkgutil.walk_packages(_real.__path__, _REAL + "."):
    sys.modules[__name__ + _found.name.removeprefix(_REAL)] = importlib.import_module(_found.name)
