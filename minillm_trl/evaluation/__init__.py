"""Evaluation of models: measures, sampling, reports."""
