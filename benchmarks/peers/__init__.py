"""One file for each tool that fedlora is measured against, and what they share.

The tools' own files (``bare.py``, ``pfl_simulation.py``, ``flower_simulation.py``) are scripts that
run in environments without fedlora; with them go ``work.py`` and ``model.py``. The others belong to
``benchmarks/peers.py``.
"""
