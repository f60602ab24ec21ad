"""Reads: label maps, manifests, the order of samples, and the batches of training and evaluation."""
