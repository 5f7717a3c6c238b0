"""`rdm sweep`: the paper's grid of filters, or its methods, on one machine, with table and figures.

    grid         names of filters, and the configurations they make
    methods      names of methods and ablations, and theirs
    options      options of the command
    queue        runs commands as processes, several at a time
    results      rows, table, figure of ranks and accuracies
    comparison   figure of all runs side by side
    make         the whole sweep

Nothing here imports torch before the runs are done: they are processes of their own.
"""
