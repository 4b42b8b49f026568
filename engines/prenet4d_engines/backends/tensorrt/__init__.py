"""Engines compiled by NVIDIA TensorRT 10, TensorRT 11 or TensorRT for RTX.

``flavors`` finds what is here; ``making`` exports, builds, compares and keeps (``build``,
``cache``); ``backend`` runs what was kept (``engine``). ``api`` is all of TensorRT that is used.
"""
