"""Pages about a model or a batch: what is in the tensors, how large they are, how near to a reference.

run.py           from the source to the file
statistics.py    the numbers of a model, counted by counts.py, as JSON by documents.py
batches.py       those of a batch, out of its report
model_page.py    a model's numbers as words, tables and plots; batch_page.py: a batch's
plots.py         small SVG figures
page.py          the HTML file around all of it
"""
