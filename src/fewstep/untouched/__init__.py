"""The pipeline as its user calls it: what a bundle must compute, whatever the compiler made of the pipeline.

The modules of this package are run in a process of their own (``python -m fewstep.untouched``), which loads a pipeline
as its user does and calls it with plain strings. They know nothing of the compiler: of fewstep they import the noise,
the one thing that is replaced, and the form of options in JSON. What the compiler heard, folded or left out can
therefore not be left out here.
"""
