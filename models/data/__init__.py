"""Sources of data, and the one format that they are brought into.

download.py       public sets from their owners, verified
item_features.py  the content of items as arrays
kuairand.py       KuaiRand
movielens.py      MovieLens
sasrec.py         SASRec and S3-Rec files
schema.py         the input format
sequences.py      a prepared data set as flat arrays
served.py         what a server recommended, joined with later events
table.py          any CSV or Parquet with a column map
validate.py       from raw tables into it, with counts of what was dropped
"""
