"""Broken files of every kind that the command reads, each with the line that it must answer.

A folder is a kind. Its `cases.yaml` says how a file is given to the command and what the command must say:

    command: data inspect {input}       # {input}: the file; {work}: the directory that it lies in; {judge}: a server
    lies: pairs/pairs.train.jsonl       # optional: where it is laid in {work}; default: its own name
    beside: model                       # optional: a function of beside.py that fills {work} first
    good: good.jsonl                    # the valid twin: the same command takes it; `as it is`: what lies there already
    broken:
      two_rows.jsonl: "{input}:2: not JSON: ..."    # a line of the error; `...` at its end: it goes on

Files that text cannot hold (binary, endless, none at all) are made by functions of `odd.py`, by their names.
"""
