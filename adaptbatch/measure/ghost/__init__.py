"""The norm of every example's gradient, from the inputs and output gradients of known layers.

======  ================================================================
probe   ``GhostProbe``: hooks the layers, returns the examples' norms
record  what one micro-batch leaves, and the check that nothing is missing
layers  which layers are known, which term each has, what is refused
terms   sums of rows and outer products, and their norms
======  ================================================================
"""

from adaptbatch.measure.ghost.probe import GhostProbe
from adaptbatch.measure.ghost.terms import direct_sq_norms, gram_sq_norms

__all__ = ["GhostProbe", "direct_sq_norms", "gram_sq_norms"]
