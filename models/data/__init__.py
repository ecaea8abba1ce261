"""Sources of data, and the input format.

catalogue.py      the items of a column map
dialect.py        how a text file is written, guessed
download.py       public data sets from their owners, verified
files.py          tables in text, JSON lines and Parquet files
guess.py          what the columns of a table mean, guessed
item_features.py  the content of items as arrays
kuairand.py       KuaiRand
movielens.py      MovieLens
sasrec.py         SASRec and S3-Rec files
schema.py         the input format
sequences.py      a prepared data set as flat arrays
served.py         logged recommendations of a server, joined with later events
table.py          any CSV or Parquet with a column map
validate.py       from raw tables to the input format, with counts of dropped rows
"""
