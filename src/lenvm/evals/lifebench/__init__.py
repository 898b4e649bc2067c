"""LIFEBench (arXiv 2505.16234): how well are length instructions followed, at what cost."""
