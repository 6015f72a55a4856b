"""From a measurement to a plan: which batch, on how many devices, at what cost in examples.

========  ============================================================================================================
curves    noise integrated over a run, steps, examples and seconds of every batch: floats and tables, no torch
advice    ``plan``: the table, a recommendation in a sentence, a picture
verdict   what branches say: the critical batch, and when it may mislead; no torch
aside     a training set aside, untouched to the last bit
branches  ``critical_batch``: short trainings from one state at several batches, the plan's assumption measured
========  ============================================================================================================
"""
