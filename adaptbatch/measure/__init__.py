"""Where gradients are measured: squared norms of micro-batches, or of single examples, on their way to ``.grad``.

=======  ==========================================================================================
sensor   turns backward passes into the sums of a window
probe    one hook a parameter: the norm of a micro-batch's gradient
ghost    the norm of every example's gradient, from the inputs and output gradients of known layers
norms    norms of gradients of any layout and precision
copies   copies of gradients, for what squared norms cannot give
seal     whether ``.grad`` is still what the window accumulated in it
=======  ==========================================================================================
"""
