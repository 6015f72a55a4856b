"""Where gradients are touched: micro-batches accumulate to the exact mean of a window, whatever is measured of them.

===========  =======================================================================
accumulator  makes ``.grad`` the mean, and notices whoever else writes there
window       the open window: what it weighs, and what may happen to it next
gradients    what is in ``.grad``: its norm, its marks, its mean
seal         whether ``.grad`` is still what the window accumulated in it
suspicion    a wrong that only the device knows of as yet
stream       micro-batches as they are handed out: which is a window's last
ranks        several processes: who synchronises when, one all-reduce a window
===========  =======================================================================
"""
