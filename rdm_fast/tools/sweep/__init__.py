"""The paper's grid of filters on one machine: a run each, one table and one figure.

    grid      names of filters, and what they make of a configuration
    options   what `rdm sweep` was asked to do
    queue     commands as processes, some at a time
    results   rows, table, figure
    make      all of it

Nothing here imports torch: the runs are processes of their own.
"""
