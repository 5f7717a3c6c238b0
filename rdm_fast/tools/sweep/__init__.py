"""`rdm sweep`: the paper's grid of filters on one machine, with one table and one figure.

    grid      names of filters, and the configurations they make
    options   options of the command
    queue     runs commands as processes, several at a time
    results   rows, table, figure
    make      the whole sweep

Nothing here imports torch: the runs are processes of their own.
"""
