"""One file for each operator or family: the maths, the cost, the source, and ``SAMPLES`` that test it.

To add a rule, write ``rules/<op>.py``; it is imported, tested and listed from there.
"""

import importlib
import pkgutil

for _module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
