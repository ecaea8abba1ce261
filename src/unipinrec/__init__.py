"""Export and inference runtime for recommenders that retrieve and rank with one transformer.

A user's history is encoded once; its per-layer key/value tensors serve retrieval and then ranking
(UniPinRec, arXiv 2606.00422). `unipinrec.models` trains such a model, `unipinrec.export` writes a trained one
as a self-contained bundle, `unipinrec.runtime` serves a bundle without torch.
"""

from unipinrec.errors import UnipinrecError

__all__ = ["UnipinrecError", "__version__"]
__version__ = "0.1.0.dev0"
