"""What the Python suites share: every test_ function of a module is a case, given a folder of its own."""

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path


LONG = bool(os.environ.get("LONG"))  # full sizes and repetitions


class Skip(Exception):
    """What is not here."""


def long(test):
    """Of a case that runs with LONG=1 alone."""
    test.long = True
    return test


def main(module):
    """Runs the module's cases, or those named on the command line, and counts them. Returns the exit status."""
    passed = failed = skipped = 0
    for name, test in list(vars(module).items()):
        if not name.startswith("test_") or (len(sys.argv) > 1 and name not in sys.argv[1:]):
            continue
        if getattr(test, "long", False) and not LONG:
            print(f"left to LONG=1: {name[5:].replace('_', ' ')}", flush=True)
            continue
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(Path(folder))
                passed += 1
                print(f"passed   {name[5:].replace('_', ' ')}, {time.time() - start:.1f} s", flush=True)
            except Skip as why:
                skipped += 1
                print(f"SKIPPED: {name[5:].replace('_', ' ')}: {why}", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED: {test.__doc__}", flush=True)
                traceback.print_exc(file=sys.stdout)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return failed > 0
