"""Invertible residual networks as classifiers, after Behrmann et al. 2019 (arXiv 1811.00995), and the hybrid of both.

model.py     the classifier, its way back from the features to the image, and its vanilla twin
hybrid.py    one network for log p(x) and log p(y|x)
tasks.py     images with their classes
measure.py   error rates, and how well features give the image back
run.py       `python -m comparisons classify`: methods x seeds through the one training loop, table and picture
"""
