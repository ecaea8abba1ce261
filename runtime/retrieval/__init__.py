"""From queries to candidates: the index, the exact scan, and the choice between them.

index.py        the hnswlib index
index_build.py  building and growing the index, and measuring its recall
index_file.py   checks of the index's file, before hnswlib loads it
retriever.py    from queries to candidates
sampling.py     the index's recall, sampled in service
scan.py         the exact scan, in fp32 or of a copy in int8, and exact similarities
"""
