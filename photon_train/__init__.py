"""Photon: the model, its processor, and training."""
