"""Offline selection: a smaller dataset from a larger one, and scores of its documents.

    pool.py        the documents to choose from: lengths, domains, columns
    uniform.py, qurating.py, dsir.py    a score for every document
    choice.py      which documents to take, given scores and a budget
    copy.py        the chosen documents as a dataset
    record.py      P.select.json
    select.py      all of it: tools/select_data.py

    texts.py       documents as text, decoded from their tokens
    words.py, buckets.py    words of many texts at once, and DSIR's hash of them
    workers.py     batches of documents over several processes
    statistics.py, score.py    columns of cheap statistics: tools/score_data.py

    tokens.py, windows.py      documents as rows of tokens for a model
    language_model.py          a model that scores them
    perplexity.py, token_losses.py    its losses, a column or a file with one for every token
    rater.py                   a weighting model's scores, and a selection by them

A new method is a class like `UniformScores`; a new statistic is a function and a line.
"""
