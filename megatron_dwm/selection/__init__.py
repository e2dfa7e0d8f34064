"""Offline selection: a smaller dataset from a larger one, and cheap scores of its documents.

pool.py        the documents to choose from: lengths, domains, columns
uniform.py, qurating.py, dsir.py    a score for every document
choice.py      which documents to take, given scores and a budget
copy.py        the chosen documents as a dataset
record.py      P.select.json
select.py      all of it: tools/select_data.py
"""
