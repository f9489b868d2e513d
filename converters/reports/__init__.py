"""Pages about a model or a batch: what is in the tensors, how large they are, how near to a reference.

statistics.py   the numbers of a model, in one pass over its payload
batches.py      those of a batch, out of its report
model_page.py, batch_page.py    the numbers as words, tables and plots
plots.py        small SVG figures
page.py         the HTML file around all of it
"""
