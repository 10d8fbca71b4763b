"""Distillation of a frozen teacher into the mixers of a supernet."""
