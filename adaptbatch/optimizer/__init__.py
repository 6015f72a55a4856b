"""The optimizer's step, and what may follow the batch.

=============  =====================================================================================
step           through a GradScaler, under a coupling's adjustment; a gate for steps of somebody else
learning_rate  ``LearningRate``: rate, ``beta2`` and second moment follow the batch; floats only
second_moment  Adam's state: the metric in which it descends, and its rescaling
schedule       ``ScheduleDriver``: schedulers in examples instead of steps
=============  =====================================================================================
"""
