"""Where gradients are touched: micro-batches accumulate to the exact mean of a window. Knows no norm.

=======  ==============================================================================
window   one window's weights, sums and state, open on the device, finished on the host
stream   micro-batches as they are handed out: which is a window's last
ranks    several processes: who synchronises when, one all-reduce a window
=======  ==============================================================================
"""
