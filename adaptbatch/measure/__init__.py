"""Where gradients are measured, on their way to ``.grad`` and in it; nothing here changes one.

========  ==========================================================================================================
sensor    turns backward passes into the sums of a window
sums      what is measured, by name, and how each of it follows the loss scale and the mean
result    a finished window's numbers, on their way to the host
passes    somebody else's loop: its backward passes are micro-batches, what lies between two steps is a window
probe     one hook a parameter: the norm of a micro-batch's gradient
ghost     the norm of every example's gradient, from the inputs and output gradients of known layers
norms     the norms of one backward pass
copies    copies of gradients, for what squared norms cannot give
examples  how many examples a model was called with
========  ==========================================================================================================
"""
