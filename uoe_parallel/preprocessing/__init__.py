"""From text to tokens: files of documents to Megatron's .bin/.idx pairs.

`spans.py` finds files and cuts them into pieces, `sources.py` reads the documents of a piece,
`parts.py` turns a piece into a part of the corpus, in any process and any order, `pair.py` joins
parts, and `session.py` is all of it. What is in a part depends on its piece alone, and parts are
joined in the order of the sources: so neither the number of workers nor being killed and started
again shows in a byte of the result.

`listops.py` draws a task instead of reading it, and `listops_corpus.py` writes it.
"""
