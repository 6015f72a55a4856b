"""A check for a machine with a GPU: ``python -m studies.device OUT_FOLDER``, from the repository, nothing installed.

Needs torch, numpy, scipy and pandas. Sections run one after the other in a process of their own, which is replaced when
one of them hangs or leaves the device in error; each writes ``NAME.csv`` row by row and ``NAME.txt`` when it ends.
"""
