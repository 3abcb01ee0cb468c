"""Turns a forked process into a program: see ``Program`` in conftest.py.

That class sets ``arguments``, ``environment``, ``output`` and ``server``: the address of the
process that this one was forked from.
"""
# ruff: noqa: F821, S102

import atexit
import gc
import importlib
import os
import runpy
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

gc.freeze()  # the server's imports are never garbage
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
if "OWN_SERVER" not in environment:  # a new one would import torch again
    forkserver._forkserver._forkserver_address = server
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
os.environ.clear()
os.environ.update(environment)
with Path(output).open("wb", buffering=0) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
sys.argv = ["-c", *arguments[2:]] if arguments[0] == "-c" else arguments
sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
os.chdir(Path(__file__).parent.parent)
if "WITH_CURVES" not in environment:  # drawing them takes as long as all updates of a tiny run
    for name in ("runs.run", "training.run"):
        importlib.import_module(f"hpm_video.{name}").plot_curves = lambda *_: None
try:
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
        runpy.run_path(arguments[0], run_name="__main__")
finally:
    atexit._run_exitfuncs()  # processes of multiprocessing skip them
