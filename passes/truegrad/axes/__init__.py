"""What ordinary operators do to the axis of the samples; one file for each kind of operator, imported and registered here."""

import importlib
import pkgutil

for _module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
