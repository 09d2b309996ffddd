"""What stands around the method: runs that are kept as files, and what is made of them.

A room uses only what is below its floor:

    prepare     report          bench           what the Makefile calls, with make
    make        figures         bench_tables
    tables      report_tables                   left: the paper's tables as runs; middle: runs as tables
                claims
                differences                     rows of runs, compared
    measure     rows                            a checkpoint measured, records read
    runs                                        a run as a file
    data                                        data sets
    files                                       files that are whole, and where a number comes from
    ranks       command                         several processes; errors of one line
    baselines   evaluate                        the other methods, the metrics
    lure                                        the method, its stream and its loop

The command lines of baselines.py and evaluate.py are in runs and measure, imported within `main`.
"""
