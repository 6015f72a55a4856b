"""What happened, for people: the history as a table, in sentences, in plots, on a page, in loggers.

=========  ======================================================
history    ``History``: a row a window, as a pandas table
explain    three sentences on the last decision
loggers    TensorBoard, Weights & Biases, a line in the terminal
curves     what is drawn, as values; ``plot`` with matplotlib
html       ``report``: one page that needs no network
=========  ======================================================
"""

from adaptbatch.reporting.loggers import Logger, ProgressLine, TensorBoardLogger, WandbLogger

__all__ = ["Logger", "ProgressLine", "TensorBoardLogger", "WandbLogger"]
