"""From a measurement to a plan: which batch, on how many devices, at what cost in examples.

========  ============================================================================================================
curves    noise integrated over a run, steps, examples and seconds of every batch: floats and tables, no torch
advice    ``plan``: the table, a recommendation in a sentence, a picture
branches  ``critical_batch``: short trainings from one state at several batches, the plan's assumption measured
========  ============================================================================================================
"""
