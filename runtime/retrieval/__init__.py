"""From queries to candidates: the index, the exact scan, and the choice between them.

index.py        hnswlib and the exact scan
index_build.py  building and growing it, and its measured recall
index_file.py   the index's file, checked before hnswlib believes it
retriever.py    from queries to candidates
sampling.py     the index's recall, sampled in service
"""
