"""Models of other libraries as something to export: each event is an item, and the scores are the library's own.

hugging_face.py  causal decoders of transformers whose tokens are items: Llama, Qwen2
sasrec.py        SASRec of RecTools

No module imports the library whose models it reads.
"""
